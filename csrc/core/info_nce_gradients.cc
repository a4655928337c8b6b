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

// Step 3 of a strip.
void InfoNCESolver::accumulate_gradients(const Strip& s) {
  const int64_t rows = round_up(ceil_div(s.rows, kTasks), mm_.mr), tasks = ceil_div(s.rows, rows);  // rows of a task
  for (int64_t index = 0; index < blocks_ && !stopped(0); ++index) {
    const Block b = block(index);
    const int64_t step_g = panel_bytes(mm_, mm_.mr, b.columns), step_t = panel_bytes(mm_, mm_.mr, s.rows);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const Slice& slice = slices_[m];
      const StageScope gradients(Stage::gradients);
      parallel_for(1 + tasks, t_.threads, [&](int64_t task, int thread) {
        if (task == 0) return pack_documents(b, slice, true, packed_d_ + 0, scratch(thread));
        const StageScope weights(Stage::weights);
        const int64_t first = (task - 1) * rows, last = std::min(first + rows, s.rows);
        float* moments = moments_ + (task - 1) * kBlock;
        std::fill_n(moments, kBlock, 0.0f);
        for (int64_t r = first; r < last; ++r) make_weights(s, b, m, r, moments, thread);
        const StageScope pack(Stage::pack);
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
        const StageScope pack(Stage::pack);
        pack_a(mm_, g_ + first, 1, kBlock, last - first, s.rows, packed_g_transposed_ + first / mm_.mr * step_t);
        if (t_.normalize)
          for (int64_t lane = 0; lane < tasks; ++lane)
            for (int64_t j = first; j < last; ++j)
              column_moment_[m * t_.columns + b.begin + j] += moments_[lane * kBlock + j];
      });
      const int64_t panels = 2;  // of a task of dD
      parallel_for(ceil_div(slice.width, panels * mm_.nr), t_.threads, [&](int64_t task, int) {
        const int64_t first = task * panels * mm_.nr, width = std::min(panels * mm_.nr, slice.width - first);
        const char* q = packed_rows_ + slice.packed_rows + task * panels * panel_bytes(mm_, mm_.nr, s.rows);
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
