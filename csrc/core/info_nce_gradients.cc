// Step 3 of a strip: the weights G and the gradients (core/info_nce_solver.h).
#include "core/info_nce_solver.h"

#include <algorithm>
#include <atomic>

#include "core/parallel.h"

namespace refine_fast {

namespace {

void wait_for(const std::atomic<int64_t>& turn, int64_t index) {
  const StageScope wait(Stage::wait);
  for (int64_t now; (now = turn) != index;) turn.wait(now);
}

}  // namespace

// Adds G of row r under prefix m to the block's G, and its part of sum_i G_ij s_ij to column_moments.
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
  float* g = work(thread).g + r * kBlock;
  if (m == prefixes_ - 1)
    std::copy_n(weights, kBlock, g);
  else
    loss_.axpy(1.0f, weights, g, kBlock);
}

// Step 3 of a strip. A task is a block of columns: it owns dD's rows, and adds to dQ and the rows' other sums in its
// turn, after the block before it, one group of rows at a time; before or after dD, so that it rarely waits. Barriers
// after each of the products of a block would cost two threads a tenth of the time, and far more where another process
// takes a core now and then.
void InfoNCESolver::accumulate_gradients(const Strip& s) {
  const int64_t rows = group_rows(s), groups = ceil_div(s.rows, rows);
  std::vector<std::atomic<int64_t>> turns(prefixes_ * groups);  // of dQ: the block that adds next
  const StageScope gradients(Stage::gradients);
  // The body must not throw: the blocks behind one that is left out would wait for its turn for ever.
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    const Block b = block(index);
    const Work w = work(thread);
    const int64_t step_g = panel_bytes(mm_, mm_.mr, b.columns);
    const bool go_on = !stopped(thread);
    for (int64_t m = prefixes_ - 1; m >= 0; --m) {
      const Slice& slice = slices_[m];
      if (go_on) {
        pack_documents(b, slice, true, w.documents, scratch(thread));
        for (int64_t first = 0; first < s.rows; first += rows) {
          const StageScope weights(Stage::weights);
          const int64_t last = std::min(first + rows, s.rows);
          float moments[kBlock] = {};
          for (int64_t r = first; r < last; ++r) make_weights(s, b, m, r, moments, thread);
          for (int64_t j = 0; j < b.columns && t_.normalize; ++j)
            column_moment_[m * t_.columns + b.begin + j] += moments[j];
          const StageScope pack(Stage::pack);
          pack_a(mm_, w.g + first * kBlock, kBlock, 1, last - first, b.columns, w.g_rows + first / mm_.mr * step_g);
        }
      }
      std::atomic<int64_t>* turn = turns.data() + m * groups;
      const auto add_to_documents = [&] {
        if (!go_on) return;
        {
          const StageScope pack(Stage::pack);
          pack_a(mm_, w.g, 1, kBlock, b.columns, s.rows, w.g_columns);
        }
        const int64_t panels = 2;  // of the queries at a time: G^T, smaller than all of them, stays in L2
        for (int64_t c = 0; c < slice.width; c += panels * mm_.nr)
          matmul(mm_, w.g_columns, packed_rows_ + slice.packed_rows + c / mm_.nr * panel_bytes(mm_, mm_.nr, s.rows),
                 b.columns, std::min(panels * mm_.nr, slice.width - c), s.rows,
                 t_.grad_d + b.begin * t_.width + slice.begin + c, t_.width, s.begin > 0);
      };
      const bool last = turn[0] != index;
      if (last) add_to_documents();
      for (int64_t group = 0; group < groups; ++group) {
        wait_for(turn[group], index);
        const int64_t first = group * rows, n = std::min(rows, s.rows - first);
        if (go_on)
          matmul(mm_, w.g_rows + first / mm_.mr * step_g, w.documents, n, slice.width, b.columns,
                 t_.grad_q + (s.begin + first) * t_.width + slice.begin, t_.width, index > 0);
        for (int64_t r = first; r < first + n && go_on && t_.symmetric; ++r)
          tau_[s.begin + r] -= w.parts[r].tau, row(m, r).moment += w.parts[r].moment;
        turn[group] = index + 1;  // also of a task that stopped: the next one waits for it
        turn[group].notify_all();
      }
      if (!last) add_to_documents();
    }
  });
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
