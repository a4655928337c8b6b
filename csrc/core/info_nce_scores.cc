// Steps 1 and 2 of a strip: its scores, and the softmax of each of its rows (core/info_nce_solver.h).
#include "core/info_nce_solver.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"

namespace refine_fast {

// 1 / |x| for each prefix of x, to out[m * stride].
void InfoNCESolver::inverse_norms(const float* x, int64_t stride, float* out) const {
  float squares = 0;
  for (int64_t m = 0; m < prefixes_; ++m) {
    squares += loss_.dot(x + slices_[m].begin, x + slices_[m].begin, slices_[m].width);
    out[m * stride] = 1.0f / std::max(std::sqrt(squares), kEpsilon);
  }
}

// Packs the block's documents as the right operand of S (k along the width) or, transposed, of dQ (k along the
// columns).
void InfoNCESolver::pack_documents(const Block& b, const Slice& slice, bool transposed, char* out,
                                   float* scratch) const {
  const StageScope pack(Stage::pack);
  const int64_t cols = transposed ? slice.width : b.columns, k = transposed ? b.columns : slice.width;
  const void* src = at(t_.d, b.begin * t_.width + slice.begin);
  if (t_.dtype == Dtype::bf16 && direct_) {
    const int64_t col_stride = transposed ? 1 : t_.width, k_stride = transposed ? t_.width : 1;
    for (int64_t c = 0; c < cols; c += mm_.nr, out += panel_bytes(mm_, mm_.nr, k))
      mm_.pack_b_bf16(static_cast<const uint16_t*>(src) + c * col_stride, col_stride, k_stride,
                      std::min<int64_t>(mm_.nr, cols - c), k, out);
    return;
  }
  const float* rows = static_cast<const float*>(src);
  int64_t pitch = t_.width;
  if (!direct_) {
    for (int64_t j = 0; j < b.columns; ++j)
      isa_.to_f32(at(src, j * t_.width), t_.dtype, slice.width, scratch + j * slice.width);
    rows = scratch, pitch = slice.width;
  }
  pack_b(mm_, rows, transposed ? 1 : pitch, transposed ? pitch : 1, cols, k, out);
}

void InfoNCESolver::find_norms() {
  parallel_for(t_.rows, t_.threads,
               [&](int64_t i, int thread) { inverse_norms(load(t_.q, i, 1, scratch(thread)), t_.rows, norm_q_ + i); });
  parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) {
    inverse_norms(load(t_.d, j, 1, scratch(thread)), t_.columns, norm_d_ + j);
  });
}

// Step 1: the strip's scores under every prefix.
void InfoNCESolver::score_strip(const Strip& s) {
  {
    const StageScope pack(Stage::pack);
    queries_ = load(t_.q, s.begin, s.rows, q_ + 0);
    for (const Slice& slice : slices_) {
      pack_a(mm_, queries_ + slice.begin, t_.width, 1, s.rows, slice.width, packed_q_ + slice.packed_q);
      if (gradients_)
        pack_b(mm_, queries_ + slice.begin, 1, t_.width, slice.width, s.rows, packed_rows_ + slice.packed_rows);
    }
  }
  const StageScope scores_stage(Stage::scores);
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    if (stopped(thread)) return;
    const Block b = block(index);
    char* d = panels_ + thread * panel_bytes_;
    for (int64_t m = 0; m < prefixes_; ++m) {
      if (m > 0)
        for (int64_t r = 0; r < s.rows; ++r) std::copy_n(scores(m - 1, r) + b.begin, b.columns, scores(m, r) + b.begin);
      pack_documents(b, slices_[m], false, d, scratch(thread));
      matmul(mm_, packed_q_ + slices_[m].packed_q, d, s.rows, b.columns, slices_[m].width, scores(m, 0) + b.begin,
             pitch_, m > 0);
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

// The scores of query i (row r of the strip) with its own negatives; -inf for those that are masked out.
void InfoNCESolver::score_hard(int64_t i, int64_t r, int thread) const {
  float* norms = scratch(thread) + scratch_floats_ - prefixes_;
  for (int64_t m = 0; m < prefixes_; ++m) std::fill_n(hard_scores(m, r), hard_pitch_, -kInfinity);
  for (int64_t k = 0; k < t_.hards; ++k) {
    if (!is_used(i, k)) continue;
    const float *q = queries_ + r * t_.width, *h = load(t_.hard, i * t_.hards + k, 1, scratch(thread));
    if (t_.normalize) inverse_norms(h, 1, norms);
    float s = 0;
    for (int64_t m = 0; m < prefixes_; ++m) {
      s += loss_.dot(q + slices_[m].begin, h + slices_[m].begin, slices_[m].width);
      hard_scores(m, r)[k] = t_.normalize ? s * norm_q(m, i) * norms[m] : s;
    }
  }
}

// Step 2 for row r of the strip: its loss, and what step 3 needs to turn its scores into weights.
void InfoNCESolver::row_softmax(const Strip& s, int64_t r, int thread) {
  const int64_t i = s.begin + r, own = t_.positives[i];
  if (t_.hards > 0) score_hard(i, r, thread);
  // Private negatives are scored by `dot`, which may round otherwise than the matrix product. Their ceiling follows
  // from the positive's score by `dot`, so that a negative equal to the positive ties with it.
  const bool own_ceiling = margin_ && t_.hards > 0;
  const float *q = queries_ + r * t_.width, *d = own_ceiling ? load(t_.d, own, 1, scratch(thread)) : nullptr;
  float own_score = 0;
  for (int64_t m = 0; m < prefixes_; ++m) {
    const float positive = scores(m, r)[own], ceiling = positive + t_.margin;
    float hard_ceiling = ceiling;
    if (own_ceiling) {
      own_score += loss_.dot(q + slices_[m].begin, d + slices_[m].begin, slices_[m].width);
      hard_ceiling = own_score * norm_q(m, i) * norm_d(m, own) + t_.margin;
    }
    const ScoreRow all = {scores(m, r), ids_ + 0, round_up(t_.columns, 16), ids_[own], ceiling};
    const ScoreRow hard = {hard_scores(m, r), nullptr, hard_pitch_, 0, hard_ceiling};
    const float top = std::max({positive, loss_.top(all), loss_.top(hard)});
    double sums[2] = {};  // over the negatives, with z = (s - top) / tau: of exp(z), of z exp(z)
    loss_.sums(all, scale_, top, sums);
    loss_.sums(hard, scale_, top, sums);
    const double shift = (static_cast<double>(positive) - top) * scale_, e = std::exp(shift), total = e + sums[0];
    t_.loss[m * directions_ * t_.rows + i] =
        static_cast<float>(e > sums[0] ? std::log1p(sums[0] / e) : std::log(total) - shift);
    if (!gradients_) continue;
    const double c = static_cast<double>(t_.coefficients[i]) * t_.prefix_weights[m] / directions_;
    const double moment = c * (sums[1] - sums[0] * shift) / total;
    const float factor = static_cast<float>(c * scale_ / total);
    row(m, r) = {top, ceiling, factor, static_cast<float>(-sums[0] * factor), static_cast<float>(moment)};
    tau_[i] -= moment * scale_;
    loss_.weights(hard, scale_, top, factor, hard_weights(m, r));
  }
}

}  // namespace refine_fast
