// The other direction of the symmetric loss: for each pair, the softmax over the queries (core/info_nce_solver.h).
#include "core/info_nce_solver.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/parallel.h"

namespace refine_fast {

// Gives every query a slot, in the order of the positives, block of columns by block.
void InfoNCESolver::index_pairs() {
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
    max_slots_ = std::max(max_slots_, static_cast<int64_t>(column_.size()) - first_slot_.back());
  }
  first_slot_.push_back(static_cast<int64_t>(column_.size()));
  slot_scratch_.reset(new float[t_.threads * 2 * max_slots_]);
  pairs_.reserve(prefixes_);
  for (int64_t m = 0; m < prefixes_; ++m) pairs_.emplace_back(first_slot_.back());
}

// The score of each pair, from which the margin's ceiling follows and where the running maximum starts. It is taken
// from the same product as the strips' scores: a query that occurs twice must tie with itself to the bit, or rounding
// would decide whether a margin of 0 drops it.
void InfoNCESolver::score_pairs() {
  const StageScope scores_stage(Stage::scores);
  parallel_for(ceil_div(t_.rows, kPairs), t_.threads, [&](int64_t task, int thread) {
    const int64_t begin = task * kPairs, n = std::min(kPairs, t_.rows - begin), width = t_.width;
    float *d = scratch(thread), *s = d + kPairs * width, *rows = s + kPairs * kPairs;
    for (int64_t k = 0; k < n; ++k) std::copy_n(load(t_.d, t_.positives[begin + k], 1, rows), width, d + k * width);
    const float* q = load(t_.q, begin, n, rows);
    char *packed_q = work(thread).documents, *packed_d = packed_q + bytes_a(mm_, kPairs, width);
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

// The scores of row r with the positives of n slots, from slot `begin` on.
const float* InfoNCESolver::gather(int64_t m, int64_t r, int64_t begin, int64_t n, float* out) const {
  for (int64_t k = 0; k < n; ++k) out[k] = scores(m, r)[column_[begin + k]];
  return out;
}

// Adds the strip's queries to the sums of every slot.
void InfoNCESolver::sum_columns(const Strip& s) {
  const StageScope softmax(Stage::softmax);
  parallel_for(blocks_, t_.threads, [&](int64_t index, int thread) {
    if (stopped(thread)) return;
    const int64_t begin = first_slot_[index], n = first_slot_[index + 1] - begin;
    float* scores = slot_scratch(thread);
    for (int64_t m = 0; m < prefixes_; ++m)
      for (int64_t r = 0; r < s.rows; ++r)
        loss_.column_sums(gather(m, r, begin, n, scores), n, scale_, slot_ids_.data() + begin,
                          ids_[t_.positives[s.begin + r]], margin_ ? pairs_[m].ceiling.data() + begin : nullptr,
                          pairs_[m].top.data() + begin, pairs_[m].sum.data() + begin, pairs_[m].excess.data() + begin);
  });
}

// The losses of the other direction, and the weights of its negatives.
void InfoNCESolver::finish_columns() {
  for (int64_t m = 0; m < prefixes_; ++m)
    for (int64_t i = 0; i < t_.rows; ++i) {
      Pairs& p = pairs_[m];
      const int64_t slot = slot_of_[i];
      const double shift = (static_cast<double>(p.positive[slot]) - p.top[slot]) * scale_, own = std::exp(shift);
      const double others = static_cast<double>(p.sum[slot]) - p.excess[slot];
      t_.loss[(2 * m + 1) * t_.rows + i] =
          static_cast<float>(own > others ? std::log1p(others / own) : std::log(own + others) - shift);
      if (gradients_)
        p.weight[slot] = static_cast<float>(0.5 * t_.coefficients[i] * t_.prefix_weights[m] * scale_ / (own + others));
    }
}

// Adds the other direction's weights of query i, row r of the strip, and notes what they add to the row's sums.
void InfoNCESolver::add_column_weights(int64_t i, int64_t r, const Block& b, int64_t m, float* weights,
                                       int thread) const {
  const int64_t begin = first_slot_[b.begin / kBlock], n = first_slot_[b.begin / kBlock + 1] - begin,
                own = slot_of_[i] - begin;
  const Pairs& p = pairs_[m];
  float *pair_scores = slot_scratch(thread), *added = pair_scores + max_slots_;
  gather(m, r, begin, n, pair_scores);
  RowPart& part = work(thread).parts[r];
  part.tau = loss_.column_weights(pair_scores, n, scale_, slot_ids_.data() + begin, ids_[t_.positives[i]],
                                  margin_ ? p.ceiling.data() + begin : nullptr, p.top.data() + begin,
                                  p.weight.data() + begin, p.positive.data() + begin, added);
  if (own >= 0 && own < n) added[own] = -p.weight[begin + own] * p.sum[begin + own];
  part.moment = t_.normalize ? loss_.dot(added, pair_scores, n) : 0.0f;
  for (int64_t k = 0; k < n; ++k) weights[column_[begin + k] - b.begin] += added[k];
}

}  // namespace refine_fast
