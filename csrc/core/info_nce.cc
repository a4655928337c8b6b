#include "core/info_nce.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <new>
#include <numeric>
#include <vector>

#include "core/info_nce_solver.h"
#include "core/parallel.h"

namespace refine_fast {

// As many rows as keep all that grows with them within kStripBytes.
int64_t InfoNCESolver::rows_of_strip(const InfoNCE& t, int64_t pitch, int64_t hard_pitch, const MatmulKernels& mm) {
  const int64_t packed = mm.element_bytes, width = t.width * (4 + packed + (t.coefficients ? packed : 0));
  const int64_t row_bytes = 4 * t.prefix_count * (pitch + 2 * hard_pitch) + width + kBlock * (4 + 2 * packed);
  return std::min(std::clamp(kStripBytes / row_bytes, int64_t{mm.mr}, kMaxRows) / mm.mr * mm.mr,
                  round_up(t.rows, mm.mr));
}

InfoNCESolver::InfoNCESolver(const InfoNCE& t)
    : t_(t),
      isa_(kernels()),
      mm_(t.dtype == Dtype::bf16 ? *isa_.matmul_bf16 : *isa_.matmul_f32),  // f16 has too many digits for bf16
      loss_(*isa_.loss),
      gradients_(t.coefficients != nullptr),
      margin_(t.margin < kInfinity),
      scale_(1.0f / t.temperature),
      element_bytes_(t.dtype == Dtype::f32 ? 4 : 2),
      directions_(t.symmetric ? 2 : 1),
      prefixes_(t.prefix_count),
      blocks_(ceil_div(t.columns, kBlock)),
      pitch_(round_up(t.columns, 64) + 16),  // not a power of two: neighbouring rows get different cache sets
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
  // The row kernels read beyond the last column; -inf is never a negative.
  for (int64_t r = 0; r < prefixes_ * strip_rows_; ++r)
    std::fill(strip_ + r * pitch_ + t.columns, strip_ + (r + 1) * pitch_, -kInfinity);
}

const float* InfoNCESolver::load(const void* src, int64_t begin, int64_t n, float* scratch) const {
  if (t_.dtype == Dtype::f32) return static_cast<const float*>(src) + begin * t_.width;
  isa_.to_f32(at(src, begin * t_.width), t_.dtype, n * t_.width, scratch);
  return scratch;
}

// Document ids as 0, 1, ... in the order of their values, so that the kernels compare 32 bits. Without doc_ids each
// column is a document of its own: the same comparison then excludes the positive.
void InfoNCESolver::index_documents() {
  std::vector<int64_t> order(t_.columns);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (t_.doc_ids)
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return t_.doc_ids[i] < t_.doc_ids[j]; });
  int32_t id = -1;
  for (int64_t j = 0; j < t_.columns; ++j)
    ids_[order[j]] = j > 0 && t_.doc_ids && t_.doc_ids[order[j]] == t_.doc_ids[order[j - 1]] ? id : ++id;
}

// Whether the caller wants to stop: its own thread asks, every thread sees the answer.
bool InfoNCESolver::stopped(int thread) {
  using Clock = std::chrono::steady_clock;
  if (thread == 0 && t_.poll.go_on != nullptr && Clock::now() - asked_ > std::chrono::milliseconds(50)) {
    if (!t_.poll.go_on(t_.poll.context)) stopped_ = true;
    asked_ = Clock::now();
  }
  return stopped_.load(std::memory_order_relaxed);
}

Status InfoNCESolver::run() {
  Status inputs = check_rows("q", t_.q, t_.rows, nullptr);
  if (inputs) inputs = check_rows("d", t_.d, t_.columns, nullptr);
  if (inputs) inputs = check_rows("hard.flatten(0, 1)", t_.hard, t_.rows * t_.hards, t_.hard_mask);
  if (!inputs) return inputs;
  if (t_.normalize) find_norms();
  index_documents();
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < t_.rows; begin += strip_rows_)
    strips.push_back({begin, std::min(strip_rows_, t_.rows - begin)});
  if (t_.symmetric) {
    index_pairs();
    score_pairs();
    for (const Strip& s : strips) {
      score_strip(s);
      sum_columns(s);
      if (stopped(0)) return Status{Code::interrupted};
    }
    finish_columns();
  }
  for (const Strip& s : strips) {
    score_strip(s);
    if (stopped(0)) return Status{Code::interrupted};
    {
      const StageScope softmax(Stage::softmax);
      parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { row_softmax(s, r, thread); });
    }
    if (!gradients_) continue;
    accumulate_gradients(s);
    const StageScope finish(Stage::finish);
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { finish_row(s, r, thread); });
  }
  const StageScope finish(Stage::finish);
  if (gradients_) {
    if (t_.normalize) parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) { finish_document(j, thread); });
    *t_.grad_temperature = static_cast<float>(std::accumulate(tau_ + 0, tau_ + t_.rows, 0.0));
  }
  return stopped(0) ? Status{Code::interrupted} : check_losses();
}

// An error unless the n rows of x (those in the mask) are finite. The losses alone would not tell: a NaN in a column of
// weight 0 reaches only the gradients.
Status InfoNCESolver::check_rows(const char* name, const void* x, int64_t n, const uint8_t* mask) const {
  const StageScope check(Stage::check);
  std::atomic<int64_t> found{n};
  parallel_for(n, t_.threads, [&](int64_t i, int thread) {
    if (mask && !mask[i]) return;
    const float* row = load(x, i, 1, scratch(thread));
    uint32_t not_finite = 0;  // integer tests, which the compiler vectorizes
    for (int64_t j = 0; j < t_.width; ++j) not_finite |= (std::bit_cast<uint32_t>(row[j]) & 0x7f800000u) == 0x7f800000u;
    // the first row, whatever the threads
    for (int64_t known = found; not_finite && i < known && !found.compare_exchange_weak(known, i);) continue;
  });
  Status status;
  if (found == n) return status;
  status.code = Code::invalid;
  std::snprintf(status.message, sizeof status.message, "info_nce: row %lld of %s holds NaN or infinity",
                static_cast<long long>(found), name);
  return status;
}

Status InfoNCESolver::check_losses() const {
  Status status;
  for (int64_t n = 0; n < prefixes_ * directions_ * t_.rows && status; ++n)
    if (!std::isfinite(t_.loss[n])) {
      status.code = Code::invalid;
      std::snprintf(status.message, sizeof status.message,
                    "info_nce: the loss of row %lld is not finite: a product of q and d or hard overflows float32",
                    static_cast<long long>(n % t_.rows));
    }
  return status;
}

Status info_nce(const InfoNCE& task) {
  const StageScope setup(Stage::setup);
  try {
    return InfoNCESolver(task).run();
  } catch (const std::bad_alloc&) {
    Status status;
    status.code = Code::no_memory;
    std::snprintf(status.message, sizeof status.message,
                  "info_nce: no memory for the working buffers of %lld columns of width %lld",
                  static_cast<long long>(task.columns), static_cast<long long>(task.width));
    return status;
  }
}

}  // namespace refine_fast
