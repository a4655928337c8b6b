// Steps 1 and 2 of a strip: its scores, and the softmax of each of its rows (core/info_nce_solver.h).
#include "core/info_nce_solver.h"

#include <algorithm>

#include "core/parallel.h"

namespace refine_fast {

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

// The strip's queries as operands.
void InfoNCESolver::pack_queries(const Strip& s) {
  const StageScope pack(Stage::pack);
  const int64_t rows = group_rows(s);
  queries_ = t_.dtype == Dtype::f32 ? static_cast<const float*>(t_.q) + s.begin * t_.width : q_ + 0;
  parallel_for(ceil_div(s.rows, rows), t_.threads, [&](int64_t group, int) {
    const int64_t first = group * rows, n = std::min(rows, s.rows - first);
    const float* q = load(t_.q, s.begin + first, n, q_ + (t_.dtype == Dtype::f32 ? 0 : first * t_.width));
    for (const Slice& slice : slices_)
      pack_a(mm_, q + slice.begin, t_.width, 1, n, slice.width,
             packed_q_ + slice.packed_q + first / mm_.mr * panel_bytes(mm_, mm_.mr, slice.width));
  });
  if (!gradients_) return;
  const int64_t columns = 2 * mm_.nr;  // of a task
  for (const Slice& slice : slices_)
    parallel_for(ceil_div(slice.width, columns), t_.threads, [&](int64_t task, int) {
      const int64_t first = task * columns;
      pack_b(mm_, queries_ + slice.begin + first, 1, t_.width, std::min(columns, slice.width - first), s.rows,
             packed_rows_ + slice.packed_rows + first / mm_.nr * panel_bytes(mm_, mm_.nr, s.rows));
    });
}

// Step 1: the strip's scores under every prefix.
void InfoNCESolver::score_strip(const Strip& s) {
  pack_queries(s);
  const StageScope scores_stage(Stage::scores);
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    if (stopped(thread)) return;
    const Block b = block(index);
    char* d = work(thread).documents;
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

// Step 2 for row r of the strip: its loss, and what step 3 needs to turn its scores into weights.
void InfoNCESolver::row_softmax(const Strip& s, int64_t r, int thread) {
  const int64_t i = s.begin + r, own = t_.positives[i];
  const Private negatives = own_negatives(r);
  if (t_.hards > 0) score_private(i, queries_ + r * t_.width, negatives, thread);
  for (int64_t m = 0; m < prefixes_; ++m) {
    const float positive = scores(m, r)[own], ceiling = positive + t_.margin;
    const ScoreRow all = {scores(m, r), ids_ + 0, round_up(t_.columns, 16), ids_[own], ceiling};
    const ScoreRow hard = {negatives.scores + m * negatives.stride, nullptr, private_pitch_, 0, kInfinity};
    const float top = std::max({positive, loss_.top(all), loss_.top(hard)});
    double sums[2] = {};
    loss_.sums(all, scale_, top, sums);
    loss_.sums(hard, scale_, top, sums);
    row(m, r) = {softmax(i, m, (static_cast<double>(positive) - top) * scale_, sums), top, ceiling};
    if (gradients_) loss_.weights(hard, scale_, top, row(m, r).factor, negatives.weights + m * negatives.stride);
  }
}

}  // namespace refine_fast
