#include "core/infonce.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "core/cpu.h"
#include "core/loss_kernels.h"
#include "core/matmul.h"
#include "core/parallel.h"

// s_ij = q_i . d_j, p_i = softmax over j of s_ij / tau, loss_i = -log p_i,pos(i), and with c_i = coefficients[i]:
//     G_ij = c_i / tau (p_ij - [j = pos(i)])        dq_i = sum_j G_ij d_j        dd_j = sum_i G_ij q_i
//
// One strip of rows at a time (all columns; at most kStripBytes, so the B x N matrix never exists):
//   1. S = Q D^T, block of columns by block, D packed on the fly;
//   2. per row: the exact maximum over what is a negative, the sum of exp((S - max) / tau), the loss;
//   3. block by block: G from S, dQ += G D and dD += G^T Q, from the cache hierarchy.
// That is 6 B N width operations, the floor. A strip holds whole rows, so the maximum is known before any exponential is taken: no running
// rescale and no fixed shift that could underflow; any temperature and any finite scores are safe, for taking each exponential twice. Q and D
// enter the products as they came, so that in bf16 G alone is rounded: less error than torch's. The positive's weight is p - 1 = -(sum of the
// others), kept as that sum: no cancellation where the positive dominates.
// Measured on one Zen 5 core, B = 8,192, width 384 / 768: fp32 205 / 210 GFLOP/s as a whole of a peak of 248, bf16 368 / 404 of 495.
//
// Prefixes (Kusupati et al., arXiv 2205.13147: the loss of several prefix lengths at once) cost one product of the full width: scores add up
// from slice to slice of the width, S_m = S_m-1 + Q[slice m] D[slice m]^T, and so do the weights, from the last slice to the first:
// dQ[slice m] = (G_m + G_m+1 + ...) D[slice m]. A strip then holds the scores of every prefix, in fewer rows.
//
// normalize scales the scores, s = (q . d) / (|q| |d|), not the operands. Through u = x / |x| the gradient is (g - (g . u) u) / |x|, and
// g . u of a row or column is sum G_ij s_ij over it: no prefix needs a gradient of its own.
//
// symmetric adds the softmax over queries i of s_i,pos(k) for each k. Its sums need every row, so a sweep of step 1 alone comes first: 8 B N width.
//
// Deterministic whatever the number of threads: tasks are cut by the shape alone, each owns its output, and what they share is added in order.

namespace refine_fast {
namespace {

constexpr int64_t kBlock = 192;                // columns at a time: D's panels in L2; a multiple of every level's mr, nr and of 16
constexpr int64_t kTasks = 16;                 // of a strip's rows, where G is made and multiplied
constexpr int64_t kMaxRows = 640;              // of a strip: beyond, packing D anew and adding to dD once a strip no longer count
constexpr int64_t kStripBytes = 24 << 20;      // all that grows with a strip's rows
constexpr int64_t kPairs = 12;                 // of a task that scores queries with their positives
constexpr int64_t kAhead = 8;                  // rows of scores that are fetched before they are weighed
constexpr float kEpsilon = 1e-12f;             // of F.normalize

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
  struct Block {  // of columns
    int64_t begin, columns;
  };
  struct Slice {  // of the width: what a prefix adds to the one before it; where its panels lie among the strip's
    int64_t begin, width, packed_q, packed_rows;
  };
  // A row under one prefix: what turns its scores into weights, its positive's weight, sum_j G_ij s_ij
  struct Row {
    float top, ceiling, factor, own, moment;
  };
  // The other direction of a query under one prefix: score of the pair, the margin's ceiling, maximum and sum over its negatives (with its
  // excess, rounded), coefficient / (2 tau sum)
  struct Pairs {
    explicit Pairs(int64_t slots) : positive(slots), ceiling(slots), top(slots), sum(slots), excess(slots), weight(slots) {}
    std::vector<float> positive, ceiling, top, sum, excess, weight;
  };

  Block block(int64_t b) const { return {b * kBlock, std::min(kBlock, t_.columns - b * kBlock)}; }
  float* scores(int64_t m, int64_t r) const { return strip_ + (m * strip_rows_ + r) * pitch_; }
  Row& row(int64_t m, int64_t r) const { return rows_[m * strip_rows_ + r]; }
  float* hard_scores(int64_t m, int64_t r) const { return hard_ + (m * strip_rows_ + r) * hard_pitch_; }
  float* hard_weights(int64_t m, int64_t r) const { return hard_weight_ + (m * strip_rows_ + r) * hard_pitch_; }
  float norm_q(int64_t m, int64_t i) const { return t_.normalize ? norm_q_[m * t_.rows + i] : 1.0f; }
  float norm_d(int64_t m, int64_t j) const { return t_.normalize ? norm_d_[m * t_.columns + j] : 1.0f; }
  // what unit length takes away from a gradient: moment u / |x|, as a factor of x
  static float along(float moment, float inverse_norm) { return inverse_norm < 1.0f / kEpsilon ? moment * inverse_norm * inverse_norm : 0.0f; }

  const float* load(const void* src, int64_t begin, int64_t n, float* scratch) const;  // rows as float32: the source itself, or `scratch`
  const void* at(const void* src, int64_t element) const { return static_cast<const char*>(src) + element * element_bytes_; }
  void inverse_norms(const float* x, int64_t stride, float* out) const;  // of the prefixes of x
  void pack_documents(const Block& b, const Slice& slice, bool transposed, char* out, float* scratch) const;
  float* scratch(int thread) const { return scratch_ + thread * scratch_floats_; }
  bool stopped(int thread);

  void find_norms();
  void number_documents();
  void number_pairs();
  void score_pairs();
  void open(const Strip& s);        // step 1
  void sum_columns(const Strip& s);  // the other direction's sums over this strip's queries
  void finish_columns();
  bool meant(int64_t i, int64_t k) const { return !t_.hard_mask || t_.hard_mask[i * t_.hards + k]; }  // hard negative k of query i
  void score_hard(int64_t i, int64_t r, int thread) const;
  void weigh(const Strip& s, int64_t r, int thread);  // step 2, row r of the strip
  void multiply(const Strip& s);                      // step 3
  void make_weights(const Strip& s, const Block& b, int64_t m, int64_t r, float* column_moments, int thread) const;
  void add_column_weights(int64_t i, int64_t r, const Block& b, int64_t m, float* weights, int thread) const;
  const float* gather(int64_t m, int64_t r, int64_t begin, int64_t n, float* out) const;
  void close(const Strip& s, int64_t r, int thread) const;  // gradients of query i and of its own negatives
  void close_document(int64_t j, int thread) const;
  Status check_rows(const char* name, const void* x, int64_t n, const uint8_t* mask) const;
  Status check_losses() const;

  const InfoNCE& t_;
  const Kernels& isa_;
  const MatmulKernels& mm_;
  const LossKernels& loss_;
  const bool gradients_, margin_;
  const float scale_;
  const int64_t element_bytes_, directions_, prefixes_, blocks_;
  const int64_t pitch_, hard_pitch_, strip_rows_;
  const bool direct_;                           // D is packed without a float32 copy
  const int64_t scratch_floats_, panel_bytes_;  // a thread's
  std::vector<Slice> slices_;
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  // of the whole batch
  Buffer<float> norm_q_, norm_d_;  // inverse norms by prefix, if normalize
  Buffer<float> column_moment_;    // sum_i G_ij s_ij by prefix, if normalize
  Buffer<int32_t> ids_;            // dense document ids
  Buffer<double> tau_;             // by row: its part of the temperature's gradient
  // The other direction: a slot for every query, in the order of their positives; each block of columns begins at a multiple of 16, and what
  // is left over weighs nothing.
  std::vector<int64_t> first_slot_, slot_of_, column_;
  std::vector<int32_t> slot_ids_;
  std::vector<Pairs> pairs_;
  int64_t most_slots_ = 0;  // of a block
  // of a strip
  Buffer<float> strip_, hard_, hard_weight_, q_;
  Buffer<Row> rows_;
  Buffer<char> packed_q_, packed_rows_;  // the strip's queries as the left operand of S and as the right one of dD
  const float* queries_ = nullptr;       // as float32
  // of a block
  Buffer<float> g_, moments_;
  Buffer<char> packed_g_, packed_g_transposed_, packed_d_;
  // of a thread
  Buffer<float> scratch_;
  Buffer<char> panels_;
  std::unique_ptr<float[]> slot_scratch_;
};

// Rows of a strip such that all that grows with them stays within kStripBytes.
int64_t rows_of_strip(const InfoNCE& t, int64_t pitch, int64_t hard_pitch, const MatmulKernels& mm) {
  const int64_t packed = mm.element_bytes, width = t.width * (4 + packed + (t.coefficients ? packed : 0));
  const int64_t row_bytes = 4 * t.prefix_count * (pitch + 2 * hard_pitch) + width + kBlock * (4 + 2 * packed);
  return std::min(std::clamp(kStripBytes / row_bytes, int64_t{mm.mr}, kMaxRows) / mm.mr * mm.mr, round_up(t.rows, mm.mr));
}

Solver::Solver(const InfoNCE& t)
    : t_(t),
      isa_(kernels()),
      mm_(t.dtype == Dtype::bf16 ? *isa_.matmul_bf16 : *isa_.matmul_f32),  // f16 has more digits than bf16: as float32
      loss_(*isa_.loss),
      gradients_(t.coefficients != nullptr),
      margin_(t.margin < std::numeric_limits<float>::infinity()),
      scale_(1.0f / t.temperature),
      element_bytes_(t.dtype == Dtype::f32 ? 4 : 2),
      directions_(t.symmetric ? 2 : 1),
      prefixes_(t.prefix_count),
      blocks_((t.columns + kBlock - 1) / kBlock),
      pitch_(round_up(t.columns, 64) + 16),  // not a power of two: neighbouring rows lie in different cache sets
      hard_pitch_(round_up(t.hards, 16)),
      strip_rows_(rows_of_strip(t, pitch_, hard_pitch_, mm_)),
      direct_(t.dtype == Dtype::f32 || (t.dtype == Dtype::bf16 && mm_.pack_b_bf16 != nullptr)),
      scratch_floats_(std::max((direct_ ? 0 : kBlock) * t.width, kPairs * (2 * t.width + kPairs)) + t.prefix_count),
      panel_bytes_(bytes_b(mm_, kBlock, t.width)),
      norm_q_(t.normalize ? prefixes_ * t.rows : 0),
      norm_d_(t.normalize ? prefixes_ * t.columns : 0),
      column_moment_(t.normalize ? prefixes_ * t.columns : 0, 0.0f),
      ids_(round_up(t.columns, 16), -1),
      tau_(t.rows, 0.0),
      strip_(prefixes_ * strip_rows_ * pitch_),
      hard_(prefixes_ * strip_rows_ * hard_pitch_),
      hard_weight_(prefixes_ * strip_rows_ * hard_pitch_),
      q_(t.dtype == Dtype::f32 ? 0 : strip_rows_ * t.width),
      rows_(prefixes_ * strip_rows_),
      packed_q_(prefixes_ * bytes_a(mm_, strip_rows_, mm_.kr) + bytes_a(mm_, strip_rows_, t.width)),
      packed_rows_(gradients_ ? bytes_b(mm_, t.width + prefixes_ * mm_.nr, strip_rows_) : 0),
      g_(gradients_ ? strip_rows_ * kBlock : 0),
      moments_(kTasks * kBlock),
      packed_g_(gradients_ ? bytes_a(mm_, strip_rows_, kBlock) : 0),
      packed_g_transposed_(gradients_ ? bytes_a(mm_, kBlock, strip_rows_) : 0),
      packed_d_(gradients_ ? bytes_b(mm_, t.width, kBlock) : 0),
      scratch_(t.threads * scratch_floats_),
      panels_(t.threads * panel_bytes_) {
  Slice slice{0, 0, 0, 0};
  for (int64_t m = 0; m < prefixes_; ++m) {
    slice.begin += slice.width;
    slice.width = t.prefixes[m] - slice.begin;
    slices_.push_back(slice);
    slice.packed_q += bytes_a(mm_, strip_rows_, slice.width);
    slice.packed_rows += bytes_b(mm_, slice.width, strip_rows_);
  }
  for (int64_t r = 0; r < prefixes_ * strip_rows_; ++r)  // the row kernels read beyond the last column: its neighbours are no negatives
    std::fill(strip_ + r * pitch_ + t.columns, strip_ + (r + 1) * pitch_, -std::numeric_limits<float>::infinity());
}

const float* Solver::load(const void* src, int64_t begin, int64_t n, float* scratch) const {
  if (t_.dtype == Dtype::f32) return static_cast<const float*>(src) + begin * t_.width;
  isa_.to_f32(at(src, begin * t_.width), t_.dtype, n * t_.width, scratch);
  return scratch;
}

void Solver::inverse_norms(const float* x, int64_t stride, float* out) const {
  float squares = 0;
  for (int64_t m = 0; m < prefixes_; ++m) {
    squares += loss_.dot(x + slices_[m].begin, x + slices_[m].begin, slices_[m].width);
    out[m * stride] = 1.0f / std::max(std::sqrt(squares), kEpsilon);
  }
}

// The block's documents as the right operand, of S (k along the width) or, transposed, of dQ (k along the columns).
void Solver::pack_documents(const Block& b, const Slice& slice, bool transposed, char* out, float* scratch) const {
  const int64_t cols = transposed ? slice.width : b.columns, k = transposed ? b.columns : slice.width;
  const void* src = at(t_.d, b.begin * t_.width + slice.begin);
  if (t_.dtype == Dtype::bf16 && direct_) {
    const int64_t col_stride = transposed ? 1 : t_.width, k_stride = transposed ? t_.width : 1;
    for (int64_t c = 0; c < cols; c += mm_.nr, out += panel_bytes(mm_, mm_.nr, k))
      mm_.pack_b_bf16(static_cast<const uint16_t*>(src) + c * col_stride, col_stride, k_stride, std::min<int64_t>(mm_.nr, cols - c), k, out);
    return;
  }
  const float* rows = static_cast<const float*>(src);
  int64_t pitch = t_.width;
  if (!direct_) {
    for (int64_t j = 0; j < b.columns; ++j) isa_.to_f32(at(src, j * t_.width), t_.dtype, slice.width, scratch + j * slice.width);
    rows = scratch, pitch = slice.width;
  }
  pack_b(mm_, rows, transposed ? 1 : pitch, transposed ? pitch : 1, cols, k, out);
}

// Whether the caller wants to stop; asked on its own thread, and seen by all.
bool Solver::stopped(int thread) {
  using Clock = std::chrono::steady_clock;
  if (thread == 0 && t_.poll.go_on != nullptr && Clock::now() - asked_ > std::chrono::milliseconds(50)) {
    if (!t_.poll.go_on(t_.poll.context)) stopped_ = true;
    asked_ = Clock::now();
  }
  return stopped_.load(std::memory_order_relaxed);
}

void Solver::find_norms() {
  parallel_for(t_.rows, t_.threads, [&](int64_t i, int thread) { inverse_norms(load(t_.q, i, 1, scratch(thread)), t_.rows, norm_q_ + i); });
  parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) { inverse_norms(load(t_.d, j, 1, scratch(thread)), t_.columns, norm_d_ + j); });
}

// ids as 0, 1, ... in the order of their values: a comparison of 32 bits in the kernels, which also keeps a positive from being a negative
void Solver::number_documents() {
  std::vector<int64_t> order(t_.columns);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (t_.doc_ids) std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return t_.doc_ids[i] < t_.doc_ids[j]; });
  int32_t id = -1;
  for (int64_t j = 0; j < t_.columns; ++j)
    ids_[order[j]] = j > 0 && t_.doc_ids && t_.doc_ids[order[j]] == t_.doc_ids[order[j - 1]] ? id : ++id;
}

void Solver::number_pairs() {
  std::vector<int64_t> order(t_.rows);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t k) { return t_.positives[i] < t_.positives[k]; });
  slot_of_.resize(t_.rows);
  auto query = order.begin();
  for (int64_t b = 0; b < blocks_; ++b) {
    const Block columns = block(b);
    first_slot_.push_back(static_cast<int64_t>(column_.size()));
    for (; query != order.end() && t_.positives[*query] < columns.begin + columns.columns; ++query) {
      slot_of_[*query] = static_cast<int64_t>(column_.size());
      column_.push_back(t_.positives[*query]);
      slot_ids_.push_back(ids_[t_.positives[*query]]);
    }
    column_.resize(round_up(static_cast<int64_t>(column_.size()), 16), columns.begin);
    slot_ids_.resize(column_.size(), -1);
    most_slots_ = std::max(most_slots_, static_cast<int64_t>(column_.size()) - first_slot_.back());
  }
  first_slot_.push_back(static_cast<int64_t>(column_.size()));
  slot_scratch_.reset(new float[t_.threads * 2 * most_slots_]);
  pairs_.reserve(prefixes_);
  for (int64_t m = 0; m < prefixes_; ++m) pairs_.emplace_back(first_slot_.back());
}

// Before the other direction's sums: its margin, and where its running maximum starts. The diagonals of the very product that makes the
// strips' scores: a query that stands twice must tie with itself to the bit, or rounding would decide whether a margin of 0 drops it.
void Solver::score_pairs() {
  parallel_for((t_.rows + kPairs - 1) / kPairs, t_.threads, [&](int64_t task, int thread) {
    const int64_t begin = task * kPairs, n = std::min(kPairs, t_.rows - begin), width = t_.width;
    float *d = scratch(thread), *s = d + kPairs * width, *rows = s + kPairs * kPairs;
    for (int64_t k = 0; k < n; ++k) std::copy_n(load(t_.d, t_.positives[begin + k], 1, rows), width, d + k * width);
    const float* q = load(t_.q, begin, n, rows);
    char *packed_q = panels_ + thread * panel_bytes_, *packed_d = packed_q + bytes_a(mm_, kPairs, width);
    for (int64_t m = 0; m < prefixes_; ++m) {
      pack_a(mm_, q + slices_[m].begin, width, 1, n, slices_[m].width, packed_q);
      pack_b(mm_, d + slices_[m].begin, width, 1, n, slices_[m].width, packed_d);
      matmul(mm_, packed_q, packed_d, n, n, slices_[m].width, s, kPairs, m > 0);
      for (int64_t k = 0; k < n; ++k) {
        const int64_t i = begin + k, slot = slot_of_[i];
        Pairs& p = pairs_[m];
        p.top[slot] = p.positive[slot] = s[k * kPairs + k] * (norm_q(m, i) * norm_d(m, t_.positives[i]));
        p.ceiling[slot] = p.positive[slot] + t_.margin;
      }
    }
  });
}

void Solver::open(const Strip& s) {
  queries_ = load(t_.q, s.begin, s.rows, q_ + 0);
  for (const Slice& slice : slices_) {
    pack_a(mm_, queries_ + slice.begin, t_.width, 1, s.rows, slice.width, packed_q_ + slice.packed_q);
    if (gradients_) pack_b(mm_, queries_ + slice.begin, 1, t_.width, slice.width, s.rows, packed_rows_ + slice.packed_rows);
  }
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    if (stopped(thread)) return;
    const Block b = block(index);
    char* d = panels_ + thread * panel_bytes_;
    for (int64_t m = 0; m < prefixes_; ++m) {
      if (m > 0)
        for (int64_t r = 0; r < s.rows; ++r) std::copy_n(scores(m - 1, r) + b.begin, b.columns, scores(m, r) + b.begin);
      pack_documents(b, slices_[m], false, d, scratch(thread));
      matmul(mm_, packed_q_ + slices_[m].packed_q, d, s.rows, b.columns, slices_[m].width, scores(m, 0) + b.begin, pitch_, m > 0);
    }
    if (!t_.normalize) return;
    for (int64_t m = 0; m < prefixes_; ++m)
      for (int64_t r = 0; r < s.rows; ++r) {
        const float own = norm_q(m, s.begin + r), *norms = norm_d_ + m * t_.columns + b.begin;
        float* row = scores(m, r) + b.begin;
        for (int64_t j = 0; j < b.columns; ++j) row[j] *= own * norms[j];
      }
  });
}

// row r's scores with the positives of n slots' queries
const float* Solver::gather(int64_t m, int64_t r, int64_t begin, int64_t n, float* out) const {
  for (int64_t k = 0; k < n; ++k) out[k] = scores(m, r)[column_[begin + k]];
  return out;
}

void Solver::sum_columns(const Strip& s) {
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    if (stopped(thread)) return;
    const int64_t begin = first_slot_[index], n = first_slot_[index + 1] - begin;
    float* scores = slot_scratch_.get() + thread * 2 * most_slots_;
    for (int64_t m = 0; m < prefixes_; ++m)
      for (int64_t r = 0; r < s.rows; ++r)
        loss_.column_sums(gather(m, r, begin, n, scores), n, scale_, slot_ids_.data() + begin, ids_[t_.positives[s.begin + r]],
                          margin_ ? pairs_[m].ceiling.data() + begin : nullptr, pairs_[m].top.data() + begin, pairs_[m].sum.data() + begin,
                          pairs_[m].excess.data() + begin);
  });
}

void Solver::finish_columns() {
  for (int64_t m = 0; m < prefixes_; ++m)
    for (int64_t i = 0; i < t_.rows; ++i) {
      Pairs& p = pairs_[m];
      const int64_t slot = slot_of_[i];
      const double shift = (static_cast<double>(p.positive[slot]) - p.top[slot]) * scale_, own = std::exp(shift);
      const double others = static_cast<double>(p.sum[slot]) - p.excess[slot];
      t_.loss[(2 * m + 1) * t_.rows + i] = static_cast<float>(own > others ? std::log1p(others / own) : std::log(own + others) - shift);
      if (gradients_) p.weight[slot] = static_cast<float>(0.5 * t_.coefficients[i] * t_.prefix_weights[m] * scale_ / (own + others));
    }
}

void Solver::score_hard(int64_t i, int64_t r, int thread) const {
  float* norms = scratch(thread) + scratch_floats_ - prefixes_;
  for (int64_t m = 0; m < prefixes_; ++m) std::fill_n(hard_scores(m, r), hard_pitch_, -std::numeric_limits<float>::infinity());
  for (int64_t k = 0; k < t_.hards; ++k) {
    if (!meant(i, k)) continue;
    const float *q = queries_ + r * t_.width, *h = load(t_.hard, i * t_.hards + k, 1, scratch(thread));
    if (t_.normalize) inverse_norms(h, 1, norms);
    float s = 0;
    for (int64_t m = 0; m < prefixes_; ++m) {
      s += loss_.dot(q + slices_[m].begin, h + slices_[m].begin, slices_[m].width);
      hard_scores(m, r)[k] = t_.normalize ? s * norm_q(m, i) * norms[m] : s;
    }
  }
}

void Solver::weigh(const Strip& s, int64_t r, int thread) {
  const int64_t i = s.begin + r, own = t_.positives[i];
  if (t_.hards > 0) score_hard(i, r, thread);
  for (int64_t m = 0; m < prefixes_; ++m) {
    const float positive = scores(m, r)[own], ceiling = positive + t_.margin;
    const ScoreRow all = {scores(m, r), ids_ + 0, round_up(t_.columns, 16), ids_[own], ceiling};
    const ScoreRow hard = {hard_scores(m, r), nullptr, hard_pitch_, 0, ceiling};
    const float top = std::max({positive, loss_.top(all), loss_.top(hard)});
    double sums[2] = {};  // over the negatives: e, and e times how far its logit lies below the top
    loss_.sums(all, scale_, top, sums);
    loss_.sums(hard, scale_, top, sums);
    const double shift = (static_cast<double>(positive) - top) * scale_, e = std::exp(shift), total = e + sums[0];
    t_.loss[m * directions_ * t_.rows + i] = static_cast<float>(e > sums[0] ? std::log1p(sums[0] / e) : std::log(total) - shift);
    if (!gradients_) continue;
    const double c = static_cast<double>(t_.coefficients[i]) * t_.prefix_weights[m] / directions_, moment = c * (sums[1] - sums[0] * shift) / total;
    const float factor = static_cast<float>(c * scale_ / total);
    row(m, r) = {top, ceiling, factor, static_cast<float>(-sums[0] * factor), static_cast<float>(moment)};
    tau_[i] -= moment * scale_;
    loss_.weights(hard, scale_, top, factor, hard_weights(m, r));
  }
}

// G of row r under prefix m, added to the block's; column_moments: the task's.
void Solver::make_weights(const Strip& s, const Block& b, int64_t m, int64_t r, float* column_moments, int thread) const {
  alignas(64) float weights[kBlock];
  const int64_t i = s.begin + r, own = t_.positives[i];
  const Row& state = row(m, r);
  const float* from = scores(m, r) + b.begin;
  for (int64_t j = 0; j < b.columns; j += 16) __builtin_prefetch(from + kAhead * pitch_ + j);  // too short a run for the hardware to see
  loss_.weights({from, ids_ + b.begin, round_up(b.columns, 16), ids_[own], state.ceiling}, scale_, state.top, state.factor, weights);
  if (own >= b.begin && own < b.begin + b.columns) weights[own - b.begin] = state.own;
  if (t_.symmetric) add_column_weights(i, r, b, m, weights, thread);
  if (t_.normalize) {
    const float *norms = norm_d_ + m * t_.columns + b.begin, norm = norm_q(m, i);
    for (int64_t j = 0; j < b.columns; ++j) {
      column_moments[j] += weights[j] * from[j];
      weights[j] *= norm * norms[j];
    }
  }
  float* g = g_ + r * kBlock;
  if (m == prefixes_ - 1)
    std::copy_n(weights, kBlock, g);
  else
    loss_.axpy(1.0f, weights, g, kBlock);
}

// Adds the other direction's weights of query i, row r of the strip.
void Solver::add_column_weights(int64_t i, int64_t r, const Block& b, int64_t m, float* weights, int thread) const {
  const int64_t begin = first_slot_[b.begin / kBlock], n = first_slot_[b.begin / kBlock + 1] - begin, own = slot_of_[i] - begin;
  const Pairs& p = pairs_[m];
  float *pair_scores = slot_scratch_.get() + thread * 2 * most_slots_, *added = pair_scores + most_slots_;
  gather(m, r, begin, n, pair_scores);
  tau_[i] -= loss_.column_weights(pair_scores, n, scale_, slot_ids_.data() + begin, ids_[t_.positives[i]],
                                  margin_ ? p.ceiling.data() + begin : nullptr, p.top.data() + begin, p.weight.data() + begin,
                                  p.positive.data() + begin, added);
  if (own >= 0 && own < n) added[own] = -p.weight[begin + own] * p.sum[begin + own];
  if (t_.normalize) row(m, r).moment += loss_.dot(added, pair_scores, n);
  for (int64_t k = 0; k < n; ++k) weights[column_[begin + k] - b.begin] += added[k];
}

void Solver::multiply(const Strip& s) {
  const int64_t rows = round_up((s.rows + kTasks - 1) / kTasks, mm_.mr), tasks = (s.rows + rows - 1) / rows;  // of a task
  for (int64_t index = 0; index < blocks_ && !stopped(0); ++index) {
    const Block b = block(index);
    const int64_t step_g = panel_bytes(mm_, mm_.mr, b.columns), step_t = panel_bytes(mm_, mm_.mr, s.rows);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const Slice& slice = slices_[m];
      parallel_for(1 + tasks, t_.threads, [&](int64_t task, int thread) {
        if (task == 0) return pack_documents(b, slice, true, packed_d_ + 0, scratch(thread));
        const int64_t first = (task - 1) * rows, last = std::min(first + rows, s.rows);
        float* moments = moments_ + (task - 1) * kBlock;
        std::fill_n(moments, kBlock, 0.0f);
        for (int64_t r = first; r < last; ++r) make_weights(s, b, m, r, moments, thread);
        pack_a(mm_, g_ + first * kBlock, kBlock, 1, last - first, b.columns, packed_g_ + first / mm_.mr * step_g);
      });
      constexpr int64_t columns = kBlock / 2;  // of a task that packs G^T: a multiple of every level's mr
      parallel_for(tasks + 2, t_.threads, [&](int64_t task, int) {
        if (task < tasks) {
          const int64_t first = task * rows, last = std::min(first + rows, s.rows);
          matmul(mm_, packed_g_ + first / mm_.mr * step_g, packed_d_ + 0, last - first, slice.width, b.columns,
                 t_.grad_q + (s.begin + first) * t_.width + slice.begin, t_.width, index > 0);
          return;
        }
        const int64_t first = (task - tasks) * columns, last = std::min(first + columns, b.columns);
        if (first >= last) return;
        pack_a(mm_, g_ + first, 1, kBlock, last - first, s.rows, packed_g_transposed_ + first / mm_.mr * step_t);
        if (t_.normalize)
          for (int64_t lane = 0; lane < tasks; ++lane)
            for (int64_t j = first; j < last; ++j) column_moment_[m * t_.columns + b.begin + j] += moments_[lane * kBlock + j];
      });
      const int64_t panels = 2;  // of a task of dD
      parallel_for((slice.width + panels * mm_.nr - 1) / (panels * mm_.nr), t_.threads, [&](int64_t task, int) {
        const int64_t first = task * panels * mm_.nr, width = std::min(panels * mm_.nr, slice.width - first);
        matmul(mm_, packed_g_transposed_ + 0, packed_rows_ + slice.packed_rows + task * panels * panel_bytes(mm_, mm_.nr, s.rows), b.columns, width,
               s.rows, t_.grad_d + b.begin * t_.width + slice.begin + first, t_.width, s.begin > 0);
      });
    }
  }
}

void Solver::close(const Strip& s, int64_t r, int thread) const {
  const int64_t i = s.begin + r, width = t_.width;
  const float* q = queries_ + r * width;
  float *grad = t_.grad_q + i * width, *norms = scratch(thread) + scratch_floats_ - prefixes_;
  for (int64_t k = 0; k < t_.hards; ++k) {
    float *grad_hard = t_.grad_hard + (i * t_.hards + k) * width, weight = 0, taken = 0;
    std::fill_n(grad_hard, width, 0.0f);
    if (!meant(i, k)) continue;
    const float* h = load(t_.hard, i * t_.hards + k, 1, scratch(thread));
    if (t_.normalize) inverse_norms(h, 1, norms);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const int64_t begin = slices_[m].begin, n = slices_[m].width;
      const float w = hard_weights(m, r)[k];
      if (t_.normalize) taken += along(w * hard_scores(m, r)[k], norms[m]);
      weight += t_.normalize ? w * norm_q(m, i) * norms[m] : w;
      loss_.axpy(weight, h + begin, grad + begin, n);
      loss_.axpy(weight, q + begin, grad_hard + begin, n);
      loss_.axpy(-taken, h + begin, grad_hard + begin, n);
    }
  }
  float taken = 0;
  for (int64_t m = prefixes_ - 1; m >= 0 && t_.normalize; --m) {
    taken += along(row(m, r).moment, norm_q(m, i));
    loss_.axpy(-taken, q + slices_[m].begin, grad + slices_[m].begin, slices_[m].width);
  }
}

void Solver::close_document(int64_t j, int thread) const {
  const float* d = load(t_.d, j, 1, scratch(thread));
  float taken = 0;
  for (int64_t m = prefixes_ - 1; m >= 0; --m) {
    taken += along(column_moment_[m * t_.columns + j], norm_d(m, j));
    loss_.axpy(-taken, d + slices_[m].begin, t_.grad_d + j * t_.width + slices_[m].begin, slices_[m].width);
  }
}

Status Solver::run() {
  Status inputs = check_rows("q", t_.q, t_.rows, nullptr);
  if (inputs) inputs = check_rows("d", t_.d, t_.columns, nullptr);
  if (inputs) inputs = check_rows("hard.flatten(0, 1)", t_.hard, t_.rows * t_.hards, t_.hard_mask);
  if (!inputs) return inputs;
  if (t_.normalize) find_norms();
  number_documents();
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < t_.rows; begin += strip_rows_) strips.push_back({begin, std::min(strip_rows_, t_.rows - begin)});
  if (t_.symmetric) {
    number_pairs();
    score_pairs();
    for (const Strip& s : strips) {
      open(s);
      sum_columns(s);
      if (stopped(0)) return Status{Code::interrupted};
    }
    finish_columns();
  }
  for (const Strip& s : strips) {
    open(s);
    if (stopped(0)) return Status{Code::interrupted};
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { weigh(s, r, thread); });
    if (!gradients_) continue;
    multiply(s);
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { close(s, r, thread); });
  }
  if (gradients_) {
    if (t_.normalize) parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) { close_document(j, thread); });
    *t_.grad_temperature = static_cast<float>(std::accumulate(tau_ + 0, tau_ + t_.rows, 0.0));
  }
  return stopped(0) ? Status{Code::interrupted} : check_losses();
}

// Whether the n rows of x that the mask leaves are finite. A NaN in a column that weighs nothing would reach the gradients alone.
Status Solver::check_rows(const char* name, const void* x, int64_t n, const uint8_t* mask) const {
  std::atomic<int64_t> found{n};
  parallel_for(n, t_.threads, [&](int64_t i, int thread) {
    if (mask && !mask[i]) return;
    const float* row = load(x, i, 1, scratch(thread));
    uint32_t not_finite = 0;  // in integers, which the compiler takes four at a time
    for (int64_t j = 0; j < t_.width; ++j) not_finite |= (std::bit_cast<uint32_t>(row[j]) & 0x7f800000u) == 0x7f800000u;
    for (int64_t known = found; not_finite && i < known && !found.compare_exchange_weak(known, i);) continue;  // the first, whatever the threads
  });
  Status status;
  if (found == n) return status;
  status.code = Code::invalid;
  std::snprintf(status.message, sizeof status.message, "info_nce: row %lld of %s holds NaN or infinity", static_cast<long long>(found), name);
  return status;
}

Status Solver::check_losses() const {
  Status status;
  for (int64_t n = 0; n < prefixes_ * directions_ * t_.rows && status; ++n)
    if (!std::isfinite(t_.loss[n])) {
      status.code = Code::invalid;
      std::snprintf(status.message, sizeof status.message, "info_nce: the loss of row %lld is not finite: a product of q and d or hard overflows float32",
                    static_cast<long long>(n % t_.rows));
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
