#include "core/infonce.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "core/cpu.h"
#include "core/loss_kernels.h"
#include "core/matmul.h"
#include "core/parallel.h"

// s_ij = q_i . d_j, p_i = softmax over j of s_ij / tau, loss_i = -log p_i,pos(i), and with c_i = coefficients[i]:
//     dq_i = c_i / tau (sum_j p_ij d_j - d_pos)        dd_j = sum_i c_i / tau (p_ij - [j = pos(i)]) q_i
//
// One strip of rows at a time (all columns; at most kStripBytes, so the B x N matrix never exists):
//   1. S = Q D^T, block of columns by block, D packed on the fly;
//   2. per row: drop what is no negative, the exact maximum, E = exp((S - max) / tau), the sums;
//   3. with G = c / tau (p - [positive]) in place of E: dQ += G D and dD += G^T Q, block by block, from the cache hierarchy.
// That is 6 B N width operations, the floor. A strip holds whole rows, so the maximum is known before any exponential is taken: no running
// rescale and no fixed shift that could underflow; any temperature and any finite logits are safe, for 2 more sweeps over the strip (a few
// percent of the products at width 384). Q and D enter the products as they came, so that in bf16 the weights alone are rounded: less error than
// torch's. The positive's weight is p - 1 = -(sum of the others), kept as that sum: no cancellation where the positive dominates.
//
// symmetric adds the softmax over queries i of s_i,pos(k) for each k. Its sums need every row, so a sweep of step 1 alone comes first: 8 B N width.
//
// Deterministic whatever the number of threads: a task owns its output, and dQ is summed over a fixed number of lanes of column blocks.

namespace refine_fast {
namespace {

constexpr int64_t kBlock = 192;                // columns at a time: D and its panels in L2; a multiple of every level's mr and nr
constexpr int64_t kLanes = 16;                 // partial sums of dQ, the parallelism of step 3
constexpr int64_t kMaxRows = 288;              // of a strip: beyond, packing D anew for each strip no longer counts
constexpr int64_t kStripBytes = 20 << 20;      // the strip and the lanes
constexpr float kEpsilon = 1e-12f;             // of F.normalize
constexpr float kDropped = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// 64-byte aligned, not initialized
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t{64}))) {}
  Buffer(int64_t n, T value) : Buffer(n) { std::fill_n(data_, n, value); }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* operator+(int64_t i) const { return data_ + i; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

class Solver {
 public:
  explicit Solver(const InfoNCE& task);
  Status run();

 private:
  struct Strip {
    int64_t begin, rows;
  };

  // rows [begin, begin + n) of a matrix as float32, of unit length if normalize: the source itself where nothing changes, else `scratch`
  const float* load(const void* src, const float* inverse_norms, int64_t begin, int64_t n, float* scratch) const;
  // row k of query i's own negatives, likewise
  const float* load_hard(int64_t i, int64_t k, float* scratch, float* inverse_norm) const;
  float inverse_norm(const void* src, int64_t row, float* scratch) const;
  int32_t id_of_positive(int64_t i) const { return ids_[t_.positives[i]]; }
  float* scores(int64_t r) const { return strip_ + r * pitch_; }
  float* wide(int thread) const { return wide_ + thread * kBlock * t_.width; }

  void find_norms();
  void number_documents();
  void score_pairs();
  void open(const Strip& s);       // step 1
  void gather(int64_t r, int64_t begin, int64_t n, float* out) const;
  void sum_columns(const Strip& s);  // the other direction's sums over this strip's queries
  void finish_columns();
  void weigh(const Strip& s, int64_t r, int thread);  // step 2, row r of the strip
  void weigh_columns(const Strip& s, int64_t r, const float* pair_scores, float* weights);
  void multiply(const Strip& s);                           // step 3
  void close(const Strip& s, int64_t r, int thread) const;  // dq of row r from the lanes and from its own negatives, whose gradients it writes
  void project(const float* unit, float inverse_norm, float* grad) const;

  const InfoNCE& t_;
  const Kernels& isa_;
  const MatmulKernels& mm_;
  const LossKernels& loss_;
  const bool gradients_, masked_, margin_;
  const float scale_;
  const int64_t blocks_, lanes_, pitch_, hard_pitch_, strip_rows_, pairs_;  // pairs_: the columns of the other direction, padded
  const int64_t d_bytes_, e_bytes_;  // a thread's panels
  // of the whole batch
  Buffer<float> norm_q_, norm_d_;  // inverse norms, if normalize
  Buffer<int32_t> ids_;            // dense document ids, if any column can be masked
  // the other direction, by query: score of the pair and the margin's ceiling; maximum and sum over its negatives; coefficient / (2 tau sum)
  Buffer<float> positive_, ceiling_, top_, sum_, column_weight_;
  Buffer<int32_t> pair_ids_;
  Buffer<double> tau_;  // by row: its part of the temperature's gradient
  // of a strip
  Buffer<float> strip_, hard_, q_, lane_;
  Buffer<char> packed_q_, packed_rows_;  // the strip's queries as the left operand of S and as the right one of dD
  // of a thread
  Buffer<float> wide_, pair_row_;
  Buffer<char> panel_d_, panel_e_;
};

int64_t rows_of_strip(const InfoNCE& t, int64_t pitch, int64_t lanes, int64_t mr) {
  const int64_t row_bytes = 4 * (pitch + (t.coefficients ? lanes * t.width : 0));
  return std::min(std::clamp(kStripBytes / row_bytes, mr, kMaxRows) / mr * mr, round_up(t.rows, mr));
}

Solver::Solver(const InfoNCE& t)
    : t_(t),
      isa_(kernels()),
      mm_(t.dtype == Dtype::bf16 ? *isa_.matmul_bf16 : *isa_.matmul_f32),  // f16 has more digits than bf16: as float32
      loss_(*isa_.loss),
      gradients_(t.coefficients != nullptr),
      masked_(t.doc_ids != nullptr || t.symmetric),
      margin_(std::isfinite(t.margin)),
      scale_(1.0f / t.temperature),
      blocks_((t.columns + kBlock - 1) / kBlock),
      lanes_(std::min(kLanes, blocks_)),
      pitch_(round_up(t.columns, 64) + 16),  // not a power of two: neighbouring rows lie in different cache sets
      hard_pitch_(round_up(t.hards, 16)),
      strip_rows_(rows_of_strip(t, pitch_, lanes_, mm_.mr)),
      pairs_(t.symmetric ? round_up(t.rows, 16) : 0),
      d_bytes_(std::max(bytes_b(mm_, kBlock, t.width), bytes_b(mm_, t.width, kBlock))),
      e_bytes_(gradients_ ? std::max(bytes_a(mm_, strip_rows_, kBlock), bytes_a(mm_, kBlock, strip_rows_)) : 0),
      norm_q_(t.normalize ? t.rows : 0),
      norm_d_(t.normalize ? t.columns : 0),
      ids_(masked_ ? round_up(t.columns, 16) : 0, -1),
      positive_(pairs_, 0.0f),
      ceiling_(pairs_, 0.0f),
      top_(pairs_, 0.0f),
      sum_(pairs_, 0.0f),
      column_weight_(pairs_, 0.0f),
      pair_ids_(pairs_, -1),
      tau_(t.rows, 0.0),
      strip_(strip_rows_ * pitch_),
      hard_(strip_rows_ * hard_pitch_),
      q_(strip_rows_ * t.width),
      lane_(gradients_ ? lanes_ * strip_rows_ * t.width : 0),
      packed_q_(bytes_a(mm_, strip_rows_, t.width)),
      packed_rows_(gradients_ ? bytes_b(mm_, t.width, strip_rows_) : 0),
      wide_(t.threads * kBlock * t.width),
      pair_row_(t.threads * 2 * pairs_),
      panel_d_(t.threads * d_bytes_),
      panel_e_(t.threads * e_bytes_) {}

const float* Solver::load(const void* src, const float* inverse_norms, int64_t begin, int64_t n, float* scratch) const {
  const int64_t width = t_.width;
  if (t_.dtype == Dtype::f32 && !t_.normalize) return static_cast<const float*>(src) + begin * width;
  const int64_t element = t_.dtype == Dtype::f32 ? 4 : 2;
  isa_.to_f32(static_cast<const char*>(src) + begin * width * element, t_.dtype, n * width, scratch);
  if (t_.normalize)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t k = 0; k < width; ++k) scratch[r * width + k] *= inverse_norms[begin + r];
  return scratch;
}

const float* Solver::load_hard(int64_t i, int64_t k, float* scratch, float* norm) const {
  const int64_t row = i * t_.hards + k;
  *norm = t_.normalize ? inverse_norm(t_.hard, row, scratch) : 1.0f;
  return load(t_.hard, norm - row, row, 1, scratch);
}

float Solver::inverse_norm(const void* src, int64_t row, float* scratch) const {
  const int64_t element = t_.dtype == Dtype::f32 ? 4 : 2;
  isa_.to_f32(static_cast<const char*>(src) + row * t_.width * element, t_.dtype, t_.width, scratch);
  return 1.0f / std::max(std::sqrt(loss_.dot(scratch, scratch, t_.width)), kEpsilon);
}

void Solver::find_norms() {
  parallel_for(t_.rows, t_.threads, [&](int64_t i, int thread) { norm_q_[i] = inverse_norm(t_.q, i, wide(thread)); });
  parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) { norm_d_[j] = inverse_norm(t_.d, j, wide(thread)); });
}

// ids as 0, 1, ... in the order of their values: a comparison of 32 bits in the kernels
void Solver::number_documents() {
  std::vector<int64_t> order(t_.columns);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (t_.doc_ids) std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return t_.doc_ids[i] < t_.doc_ids[j]; });
  int32_t id = -1;
  for (int64_t j = 0; j < t_.columns; ++j)
    ids_[order[j]] = j > 0 && t_.doc_ids && t_.doc_ids[order[j]] == t_.doc_ids[order[j - 1]] ? id : ++id;
}

// Before the other direction's sums: its margin, and where its running maximum starts.
void Solver::score_pairs() {
  parallel_for(t_.rows, t_.threads, [&](int64_t i, int thread) {
    const float* q = load(t_.q, norm_q_ + 0, i, 1, wide(thread));
    const float* d = load(t_.d, norm_d_ + 0, t_.positives[i], 1, wide(thread) + t_.width);
    top_[i] = positive_[i] = loss_.dot(q, d, t_.width);
    ceiling_[i] = positive_[i] + t_.margin;
    pair_ids_[i] = id_of_positive(i);
  });
}

void Solver::open(const Strip& s) {
  const float* q = load(t_.q, norm_q_ + 0, s.begin, s.rows, q_ + 0);
  if (q != q_ + 0) std::memcpy(q_ + 0, q, s.rows * t_.width * sizeof(float));
  pack_a(mm_, q_ + 0, t_.width, 1, s.rows, t_.width, packed_q_ + 0);
  parallel_for(blocks_, t_.threads, [&](int64_t block, int thread) {
    const int64_t begin = block * kBlock, n = std::min(kBlock, t_.columns - begin);
    char* d = panel_d_ + thread * d_bytes_;
    pack_b(mm_, load(t_.d, norm_d_ + 0, begin, n, wide(thread)), t_.width, 1, n, t_.width, d);
    matmul(mm_, packed_q_ + 0, d, s.rows, n, t_.width, strip_ + begin, pitch_, false);
  });
}

// row r's scores with the positives of the queries [begin, begin + n)
void Solver::gather(int64_t r, int64_t begin, int64_t n, float* out) const {
  for (int64_t k = 0; k < n; ++k) out[k] = begin + k < t_.rows ? scores(r)[t_.positives[begin + k]] : 0.0f;
}

void Solver::sum_columns(const Strip& s) {
  constexpr int64_t kChunk = 512;
  parallel_for((pairs_ + kChunk - 1) / kChunk, t_.threads, [&](int64_t chunk, int) {
    alignas(64) float row[kChunk];
    const int64_t begin = chunk * kChunk, n = std::min(kChunk, pairs_ - begin);
    for (int64_t r = 0; r < s.rows; ++r) {
      gather(r, begin, n, row);
      loss_.column_sums(row, n, scale_, pair_ids_ + begin, pair_ids_[s.begin + r], margin_ ? ceiling_ + begin : nullptr, top_ + begin,
                        sum_ + begin);
    }
  });
}

void Solver::finish_columns() {
  for (int64_t i = 0; i < t_.rows; ++i) {
    const double shift = (static_cast<double>(positive_[i]) - top_[i]) * scale_, own = std::exp(shift), others = sum_[i];
    t_.loss[t_.rows + i] = static_cast<float>(own > others ? std::log1p(others / own) : std::log(own + others) - shift);
    if (gradients_) column_weight_[i] = static_cast<float>(0.5 * t_.coefficients[i] * scale_ / (own + others));
  }
}

void Solver::weigh(const Strip& s, int64_t r, int thread) {
  const int64_t i = s.begin + r, own = t_.positives[i], n = round_up(t_.columns, 16);
  float *row = scores(r), *hard = hard_ + r * hard_pitch_, *pair_scores = pair_row_ + thread * 2 * pairs_;
  const float positive = row[own], ceiling = positive + t_.margin;
  if (t_.symmetric && gradients_) gather(r, 0, pairs_, pair_scores);

  row[own] = kDropped;
  std::fill(row + t_.columns, row + n, kDropped);
  float top = std::max(positive, loss_.drop(row, n, masked_ ? ids_ + 0 : nullptr, masked_ ? id_of_positive(i) : 0, ceiling));
  if (t_.hards > 0) {
    std::fill_n(hard, hard_pitch_, kDropped);
    for (int64_t k = 0; k < t_.hards; ++k) {
      if (t_.hard_mask && !t_.hard_mask[i * t_.hards + k]) continue;
      float norm;
      hard[k] = loss_.dot(q_ + r * t_.width, load_hard(i, k, wide(thread), &norm), t_.width);
    }
    top = std::max(top, loss_.drop(hard, hard_pitch_, nullptr, 0, ceiling));
  }
  double sums[2] = {};  // over the negatives: e, and e times how far its logit lies below the top
  loss_.exponentials(row, n, scale_, top, sums);
  if (t_.hards > 0) loss_.exponentials(hard, hard_pitch_, scale_, top, sums);
  const double shift = (static_cast<double>(positive) - top) * scale_, e = std::exp(shift), total = e + sums[0];
  t_.loss[i] = static_cast<float>(e > sums[0] ? std::log1p(sums[0] / e) : std::log(total) - shift);
  if (!gradients_) return;

  const double c = t_.coefficients[i] * (t_.symmetric ? 0.5 : 1.0);
  const float factor = static_cast<float>(c * scale_ / total);
  row[own] = static_cast<float>(-sums[0]);
  tau_[i] = -c * scale_ * (sums[1] - sums[0] * shift) / total;
  for (int64_t j = 0; j < t_.columns; ++j) row[j] *= factor;
  for (int64_t k = 0; k < t_.hards; ++k) hard[k] *= factor;
  if (t_.symmetric) weigh_columns(s, r, pair_scores, pair_scores + pairs_);
}

// Adds the other direction's weights to row r of the strip.
void Solver::weigh_columns(const Strip& s, int64_t r, const float* pair_scores, float* weights) {
  const int64_t i = s.begin + r;
  float* row = scores(r);
  tau_[i] -= loss_.column_weights(pair_scores, pairs_, scale_, pair_ids_ + 0, pair_ids_[i], margin_ ? ceiling_ + 0 : nullptr, top_ + 0,
                                  column_weight_ + 0, positive_ + 0, weights);
  weights[i] = -column_weight_[i] * sum_[i];
  for (int64_t k = 0; k < t_.rows; ++k) row[t_.positives[k]] += weights[k];
}

void Solver::multiply(const Strip& s) {
  pack_b(mm_, q_ + 0, 1, t_.width, t_.width, s.rows, packed_rows_ + 0);
  parallel_for(lanes_, t_.threads, [&](int64_t lane, int thread) {
    char *d = panel_d_ + thread * d_bytes_, *e = panel_e_ + thread * e_bytes_;
    for (int64_t block = lane; block < blocks_; block += lanes_) {
      const int64_t begin = block * kBlock, n = std::min(kBlock, t_.columns - begin);
      pack_a(mm_, strip_ + begin, pitch_, 1, s.rows, n, e);
      pack_b(mm_, load(t_.d, norm_d_ + 0, begin, n, wide(thread)), 1, t_.width, t_.width, n, d);
      matmul(mm_, e, d, s.rows, t_.width, n, lane_ + lane * strip_rows_ * t_.width, t_.width, block != lane);
      pack_a(mm_, strip_ + begin, 1, pitch_, n, s.rows, e);
      matmul(mm_, e, packed_rows_ + 0, n, t_.width, s.rows, t_.grad_d + begin * t_.width, t_.width, s.begin > 0);
    }
  });
}

void Solver::close(const Strip& s, int64_t r, int thread) const {
  const int64_t i = s.begin + r, width = t_.width;
  float *grad = t_.grad_q + i * width, *scratch = wide(thread);
  const float* q = q_ + r * width;
  std::fill_n(grad, width, 0.0f);
  for (int64_t lane = 0; lane < lanes_; ++lane) loss_.axpy(1.0f, lane_ + (lane * strip_rows_ + r) * width, grad, width);
  for (int64_t k = 0; k < t_.hards; ++k) {
    const float weight = hard_[r * hard_pitch_ + k];
    float *grad_hard = t_.grad_hard + (i * t_.hards + k) * width, norm;
    std::fill_n(grad_hard, width, 0.0f);
    if (weight == 0.0f) continue;
    const float* h = load_hard(i, k, scratch, &norm);
    loss_.axpy(weight, h, grad, width);
    loss_.axpy(weight, q, grad_hard, width);
    if (t_.normalize) project(h, norm, grad_hard);
  }
  if (t_.normalize) project(q, norm_q_[i], grad);
}

// through unit = x / |x|: (grad - (grad . unit) unit) / |x|; a vector shorter than epsilon is only scaled
void Solver::project(const float* unit, float inverse_norm, float* grad) const {
  if (inverse_norm < 1.0f / kEpsilon) loss_.axpy(-loss_.dot(grad, unit, t_.width), unit, grad, t_.width);
  for (int64_t k = 0; k < t_.width; ++k) grad[k] *= inverse_norm;
}

Status Solver::run() {
  if (t_.normalize) find_norms();
  if (masked_) number_documents();
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < t_.rows; begin += strip_rows_) strips.push_back({begin, std::min(strip_rows_, t_.rows - begin)});
  if (t_.symmetric) {
    score_pairs();
    for (const Strip& s : strips) {
      open(s);
      sum_columns(s);
    }
    finish_columns();
  }
  for (const Strip& s : strips) {
    open(s);
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { weigh(s, r, thread); });
    if (!gradients_) continue;
    multiply(s);
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { close(s, r, thread); });
  }
  if (gradients_) {
    if (t_.normalize)
      parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) {
        project(load(t_.d, norm_d_ + 0, j, 1, wide(thread)), norm_d_[j], t_.grad_d + j * t_.width);
      });
    double tau = 0;
    for (int64_t i = 0; i < t_.rows; ++i) tau += tau_[i];
    *t_.grad_temperature = static_cast<float>(tau);
  }
  Status status;
  for (int64_t i = 0; i < t_.rows && status; ++i)
    if (!std::isfinite(t_.loss[i]) || (t_.symmetric && !std::isfinite(t_.loss[t_.rows + i]))) {
      status.code = Code::invalid;
      std::snprintf(status.message, sizeof status.message,
                    "info_nce: the loss of row %lld is not finite; q, d or hard holds NaN or infinity, or a product of theirs overflows float32",
                    static_cast<long long>(i));
    }
  return status;
}

}  // namespace

Status info_nce(const InfoNCE& task) {
  try {
    return Solver(task).run();
  } catch (const std::bad_alloc&) {
    Status status;
    status.code = Code::no_memory;
    std::snprintf(status.message, sizeof status.message, "info_nce: no memory for the working buffers of %lld columns of width %lld",
                  static_cast<long long>(task.columns), static_cast<long long>(task.width));
    return status;
  }
}

}  // namespace refine_fast
