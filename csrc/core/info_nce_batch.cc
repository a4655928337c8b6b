#include "core/info_nce_batch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "core/parallel.h"
#include "core/stages.h"

namespace refine_fast {

InfoNCEBatch::InfoNCEBatch(const InfoNCE& t, int64_t scratch_floats)
    : t_(t),
      isa_(kernels()),
      loss_(*isa_.loss),
      gradients_(t.coefficients != nullptr),
      margin_(t.margin < kInfinity),
      scale_(1.0f / t.temperature),
      element_bytes_(t.dtype == Dtype::f32 ? 4 : 2),
      directions_(t.symmetric ? 2 : 1),
      prefixes_(t.prefix_count),
      private_pitch_(round_up(t.hards, 16)),
      norm_q_(t.normalize ? prefixes_ * t.rows : 0),
      norm_d_(t.normalize ? prefixes_ * t.columns : 0),
      ids_(round_up(t.columns, 16), -1),
      tau_(t.rows, 0.0),
      scratch_floats_(scratch_floats + prefixes_),
      scratch_(t.threads * scratch_floats_) {
  for (int64_t m = 0, begin = 0; m < prefixes_; begin = t.prefixes[m++])
    ranges_.push_back({begin, t.prefixes[m] - begin});
  if (!gradients_) return;
  prefer_huge_pages(t.grad_q, t.rows * t.width * 4);
  prefer_huge_pages(t.grad_d, t.columns * t.width * 4);
}

const float* InfoNCEBatch::load(const void* src, int64_t begin, int64_t n, float* scratch) const {
  if (t_.dtype == Dtype::f32) return static_cast<const float*>(src) + begin * t_.width;
  isa_.to_f32(at(src, begin * t_.width), t_.dtype, n * t_.width, scratch);
  return scratch;
}

// Document ids as 0, 1, ... in the order of their values, so that the kernels compare 32 bits. Without doc_ids each
// column is a document of its own: the same comparison then excludes the positive.
void InfoNCEBatch::index_documents() {
  std::vector<int64_t> order(t_.columns);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (t_.doc_ids)
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return t_.doc_ids[i] < t_.doc_ids[j]; });
  int32_t id = -1;
  for (int64_t j = 0; j < t_.columns; ++j)
    ids_[order[j]] = j > 0 && t_.doc_ids && t_.doc_ids[order[j]] == t_.doc_ids[order[j - 1]] ? id : ++id;
}

// Whether the caller wants to stop: its own thread asks, every thread sees the answer.
bool InfoNCEBatch::stopped(int thread) {
  using Clock = std::chrono::steady_clock;
  if (thread == 0 && t_.poll.go_on != nullptr && Clock::now() - asked_ > std::chrono::milliseconds(50)) {
    if (!t_.poll.go_on(t_.poll.context)) stopped_ = true;
    asked_ = Clock::now();
  }
  return stopped_.load(std::memory_order_relaxed);
}

Status InfoNCEBatch::check_inputs() const {
  Status inputs = check_rows("q", t_.q, t_.rows, nullptr);
  if (inputs) inputs = check_rows("d", t_.d, t_.columns, nullptr);
  if (inputs) inputs = check_rows("hard.flatten(0, 1)", t_.hard, t_.rows * t_.hards, t_.hard_mask);
  return inputs;
}

// An error unless the n rows of x (those in the mask) are finite. The losses alone would not tell: a NaN in a column of
// weight 0 reaches only the gradients.
Status InfoNCEBatch::check_rows(const char* name, const void* x, int64_t n, const uint8_t* mask) const {
  const StageScope check(Stage::check);
  std::atomic<int64_t> found{n};
  parallel_for(n, t_.threads, [&](int64_t i, int) {
    if (mask && !mask[i]) return;
    // integer tests, which the compiler vectorizes
    uint32_t not_finite = 0;
    if (t_.dtype == Dtype::f32) {
      const float* row = static_cast<const float*>(x) + i * t_.width;
      for (int64_t j = 0; j < t_.width; ++j)
        not_finite |= (std::bit_cast<uint32_t>(row[j]) & 0x7f800000u) == 0x7f800000u;
    } else {
      const uint16_t* row = static_cast<const uint16_t*>(x) + i * t_.width;
      const uint16_t exponent = t_.dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
      uint16_t any = 0;
      for (int64_t j = 0; j < t_.width; ++j) any |= static_cast<uint16_t>((row[j] & exponent) == exponent);
      not_finite = any;
    }
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

Status InfoNCEBatch::check_losses() const {
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

// 1 / |x| for each prefix of x, to out[m * stride].
void InfoNCEBatch::inverse_norms(const float* x, int64_t stride, float* out) const {
  float squares = 0;
  for (int64_t m = 0; m < prefixes_; ++m) {
    squares += loss_.dot(x + ranges_[m].begin, x + ranges_[m].begin, ranges_[m].width);
    out[m * stride] = 1.0f / std::max(std::sqrt(squares), kEpsilon);
  }
}

void InfoNCEBatch::find_norms() {
  parallel_for(t_.rows, t_.threads,
               [&](int64_t i, int thread) { inverse_norms(load(t_.q, i, 1, scratch(thread)), t_.rows, norm_q_ + i); });
  parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) {
    inverse_norms(load(t_.d, j, 1, scratch(thread)), t_.columns, norm_d_ + j);
  });
}

// The scores of query i with its own negatives; -inf for those that are masked out or dropped by the margin. These
// products may round otherwise than the columns' do: the margin's ceiling follows from the positive's score by the same
// product, so that a negative equal to the positive ties with it.
void InfoNCEBatch::score_private(int64_t i, const float* q, const Private& own, int thread) const {
  float *row = scratch(thread), *ceilings = row + scratch_floats_ - prefixes_, *norms = ceilings;
  const auto product = [&](const float* x, int64_t m) {
    return loss_.dot(q + ranges_[m].begin, x + ranges_[m].begin, ranges_[m].width);
  };
  for (int64_t m = 0; m < prefixes_; ++m) std::fill_n(own.scores + m * own.stride, private_pitch_, -kInfinity);
  for (int64_t k = 0; k < t_.hards; ++k) {
    if (!is_used(i, k)) continue;
    const float* h = load(t_.hard, i * t_.hards + k, 1, row);
    if (t_.normalize) inverse_norms(h, 1, norms);
    float s = 0;
    for (int64_t m = 0; m < prefixes_; ++m) {
      s += product(h, m);
      own.scores[m * own.stride + k] = t_.normalize ? s * norm_q(m, i) * norms[m] : s;
    }
  }
  if (!margin_) return;
  const int64_t positive = t_.positives[i];
  const float* d = load(t_.d, positive, 1, row);
  float s = 0;
  for (int64_t m = 0; m < prefixes_; ++m) {
    s += product(d, m);
    const float ceiling = s * norm_q(m, i) * norm_d(m, positive) + t_.margin;
    for (int64_t k = 0; k < t_.hards; ++k) {
      float& score = own.scores[m * own.stride + k];
      if (score > ceiling) score = -kInfinity;
    }
  }
}

// The loss of query i under prefix m, from z = (s - top) / tau: that of its positive, and the sums over its negatives
// of exp(z) and of exp(z) z.
InfoNCEBatch::Weights InfoNCEBatch::softmax(int64_t i, int64_t m, double shift, const double sums[2]) {
  const double e = std::exp(shift), total = e + sums[0];
  t_.loss[m * directions_ * t_.rows + i] =
      static_cast<float>(e > sums[0] ? std::log1p(sums[0] / e) : std::log(total) - shift);
  if (!gradients_) return {};
  const double c = static_cast<double>(t_.coefficients[i]) * t_.prefix_weights[m] / directions_;
  const double moment = c * (sums[1] - sums[0] * shift) / total;
  const float factor = static_cast<float>(c * scale_ / total);
  tau_[i] -= moment * scale_;
  return {factor, static_cast<float>(-sums[0] * factor), static_cast<float>(moment)};
}

// Adds to the gradient of query i what its own negatives give it, and writes theirs.
void InfoNCEBatch::finish_private(int64_t i, const float* q, const Private& own, int thread) const {
  const int64_t width = t_.width;
  float *grad = t_.grad_q + i * width, *norms = scratch(thread) + scratch_floats_ - prefixes_;
  for (int64_t k = 0; k < t_.hards; ++k) {
    float *grad_hard = t_.grad_hard + (i * t_.hards + k) * width, weight = 0, radial = 0;
    std::fill_n(grad_hard, width, 0.0f);
    if (!is_used(i, k)) continue;
    const float* h = load(t_.hard, i * t_.hards + k, 1, scratch(thread));
    if (t_.normalize) inverse_norms(h, 1, norms);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const int64_t begin = ranges_[m].begin, n = ranges_[m].width;
      const float w = own.weights[m * own.stride + k];
      if (t_.normalize && w != 0) radial += radial_part(w * own.scores[m * own.stride + k], norms[m]);
      weight += t_.normalize ? w * norm_q(m, i) * norms[m] : w;
      loss_.axpy(weight, h + begin, grad + begin, n);
      loss_.axpy(weight, q + begin, grad_hard + begin, n);
      loss_.axpy(-radial, h + begin, grad_hard + begin, n);
    }
  }
}

}  // namespace refine_fast
