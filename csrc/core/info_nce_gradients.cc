// Step 3 of a strip: the weights G and the gradients (core/info_nce_solver.h).
#include "core/info_nce_solver.h"

#include <algorithm>

#include "core/parallel.h"

namespace refine_fast {

// Adds G of row r under prefix m to the block's G, and its part of sum_i G_ij s_ij to the task's column_moments.
void InfoNCESolver::make_weights(const Strip& s, const Block& b, int64_t m, int64_t r, float* column_moments,
                                 int thread) const {
  alignas(64) float weights[kBlock];
  const int64_t i = s.begin + r, own = t_.positives[i];
  const Row& state = row(m, r);
  const float* from = scores(m, r) + b.begin;
  // a run too short for the hardware prefetcher
  for (int64_t j = 0; j < b.columns; j += 16) __builtin_prefetch(from + kPrefetchRows * pitch_ + j);
  loss_.weights({from, ids_ + b.begin, round_up(b.columns, 16), ids_[own], state.ceiling}, scale_, state.top,
                state.factor, weights);
  if (own >= b.begin && own < b.begin + b.columns) weights[own - b.begin] = state.positive;
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

// Step 3 of a strip. A task turns the scores of some rows into weights and uses them while they are in L2: it packs
// them, adds to dQ, and packs its part of G^T, whose k they are (at every level a multiple of kr).
void InfoNCESolver::accumulate_gradients(const Strip& s) {
  const int64_t rows = round_up(ceil_div(s.rows, kTasks), mm_.mr), tasks = ceil_div(s.rows, rows);  // rows of a task
  const int64_t piece = 2 * mm_.nr;  // columns of the width in a task of packing D and of dD
  for (int64_t index = 0; index < blocks_ && !stopped(0); ++index) {
    const Block b = block(index);
    const int64_t step_t = panel_bytes(mm_, mm_.mr, s.rows);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const Slice& slice = slices_[m];
      const StageScope gradients(Stage::gradients);
      parallel_for(ceil_div(slice.width, piece), t_.threads, [&](int64_t task, int thread) {
        const int64_t first = task * piece, width = std::min(piece, slice.width - first);
        pack_documents(b, {slice.begin + first, width, 0, 0}, true,
                       packed_d_ + task * 2 * panel_bytes(mm_, mm_.nr, b.columns), scratch(thread));
      });
      parallel_for(tasks, t_.threads, [&](int64_t task, int thread) {
        const int64_t first = task * rows, n = std::min(rows, s.rows - first);
        float *moments = moments_ + task * kBlock, *g = g_ + first * kBlock;
        char* packed_g = packed_g_ + thread * packed_g_bytes_;
        {
          const StageScope weights(Stage::weights);
          std::fill_n(moments, kBlock, 0.0f);
          for (int64_t r = first; r < first + n; ++r) make_weights(s, b, m, r, moments, thread);
          const StageScope pack(Stage::pack);
          pack_a(mm_, g, kBlock, 1, n, b.columns, packed_g);
          for (int64_t j = 0; j < b.columns; j += mm_.mr)
            mm_.pack_a(g + j, 1, kBlock, std::min<int64_t>(mm_.mr, b.columns - j), n,
                       packed_g_transposed_ + j / mm_.mr * step_t + first * mm_.mr * mm_.element_bytes);
        }
        matmul(mm_, packed_g, packed_d_ + 0, n, slice.width, b.columns,
               t_.grad_q + (s.begin + first) * t_.width + slice.begin, t_.width, index > 0);
      });
      for (int64_t task = 0; task < tasks && t_.normalize; ++task)
        for (int64_t j = 0; j < b.columns; ++j)
          column_moment_[m * t_.columns + b.begin + j] += moments_[task * kBlock + j];
      parallel_for(ceil_div(slice.width, piece), t_.threads, [&](int64_t task, int) {
        const int64_t first = task * piece, width = std::min(piece, slice.width - first);
        const char* q = packed_rows_ + slice.packed_rows + task * 2 * panel_bytes(mm_, mm_.nr, s.rows);
        matmul(mm_, packed_g_transposed_ + 0, q, b.columns, width, s.rows,
               t_.grad_d + b.begin * t_.width + slice.begin + first, t_.width, s.begin > 0);
      });
    }
  }
}

// Completes the gradient of query i (row r of the strip) and writes those of its own negatives.
void InfoNCESolver::finish_row(const Strip& s, int64_t r, int thread) const {
  const int64_t i = s.begin + r;
  const float* q = queries_ + r * t_.width;
  float* grad = t_.grad_q + i * t_.width;
  finish_private(i, q, own_negatives(r), thread);
  float radial = 0;
  for (int64_t m = prefixes_ - 1; m >= 0 && t_.normalize; --m) {
    radial += radial_part(row(m, r).moment, norm_q(m, i));
    loss_.axpy(-radial, q + slices_[m].begin, grad + slices_[m].begin, slices_[m].width);
  }
}

// With normalize: removes the radial part of document j's gradient.
void InfoNCESolver::finish_document(int64_t j, int thread) const {
  const float* d = load(t_.d, j, 1, scratch(thread));
  float radial = 0;
  for (int64_t m = prefixes_ - 1; m >= 0; --m) {
    radial += radial_part(column_moment_[m * t_.columns + j], norm_d(m, j));
    loss_.axpy(-radial, d + slices_[m].begin, t_.grad_d + j * t_.width + slices_[m].begin, slices_[m].width);
  }
}

}  // namespace refine_fast
