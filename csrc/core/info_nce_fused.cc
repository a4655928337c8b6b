#include "core/info_nce_fused.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "core/parallel.h"
#include "core/stages.h"
#include "core/tile_scope.h"

namespace refine_fast {

bool InfoNCEFused::serves(const InfoNCE& t) {
  return kernels().fused_loss != nullptr && t.width > 0 && t.dtype == Dtype::bf16 && t.prefix_count == 1 &&
         !t.symmetric;
}

// The lists of all keys, of the numbers below `count` with that key.
template <class KeyOf>
InfoNCEFused::Lists InfoNCEFused::group(int64_t count, int64_t keys, const KeyOf& key_of) {
  Lists lists{std::vector<int64_t>(keys + 1, 0), std::vector<int32_t>(count)};
  for (int64_t n = 0; n < count; ++n) ++lists.first[key_of(n) + 1];
  std::partial_sum(lists.first.begin(), lists.first.end(), lists.first.begin());
  std::vector<int64_t> next(lists.first.begin(), lists.first.end() - 1);
  for (int64_t n = 0; n < count; ++n) lists.items[next[key_of(n)]++] = static_cast<int32_t>(n);
  return lists;
}

InfoNCEFused::InfoNCEFused(const InfoNCE& t)
    : InfoNCEBatch(t, 3 * t.width),
      fused_(*kernels().fused_loss),
      padded_(round_up(t.width, 32)),
      rate_(static_cast<float>(std::numbers::log2e / t.temperature)),
      k_(round_up(t.rows, fused_.rows), rate_),
      b_(round_up(t.rows, fused_.rows), -127.0f),
      positive_(round_up(t.rows, fused_.rows), 0.0f),
      factor_(round_up(t.rows, fused_.rows), 0.0f),
      ceiling_(round_up(t.rows, fused_.rows), 0.0f),
      own_(t.rows),
      total_(round_up(t.rows, fused_.rows), 0.0),
      moment_(round_up(t.rows, fused_.rows), 0.0),
      norms_(t.normalize ? round_up(t.columns, fused_.rows) : 0, 1.0f),
      group_(std::max<int64_t>(kPackedBytes / (2 * padded_) / fused_.max_columns, 1) * fused_.max_columns),
      scratch_(std::max(t.threads, 1)) {
  group_ = std::min(group_, round_up(std::max(t.rows, t.columns), fused_.rows));
  columns_ = WorkBuffer(group_ * padded_ * 2);
}

// The scores of the queries with their positives, from the product that scores the columns: a query that occurs twice
// must tie with itself to the bit, or rounding would decide whether a margin of 0 drops it.
void InfoNCEFused::score_positives() {
  const StageScope scores(Stage::scores);
  const int64_t height = fused_.rows, bytes = padded_ * 64;
  std::vector<WorkBuffer> panels;
  for (int thread = 0; thread < std::max(t_.threads, 1); ++thread) panels.emplace_back(3 * bytes);
  parallel_for(ceil_div(t_.rows, height), t_.threads, [&](int64_t task, int thread) {
    const int64_t begin = task * height, n = std::min(height, t_.rows - begin);
    char *rows = panels[thread].data(), *columns = rows + bytes;
    uint16_t* gathered = reinterpret_cast<uint16_t*>(columns + bytes);
    for (int64_t r = 0; r < n; ++r)
      std::copy_n(row_of(t_.d, t_.positives[begin + r]), t_.width, gathered + r * t_.width);
    fused_.pack_rows(row_of(t_.q, begin), t_.width, n, t_.width, rows);
    fused_.pack_columns(gathered, t_.width, n, t_.width, columns);
    const TileScope scope(fused_);
    fused_.score_pairs(rows, columns, t_.width, positive_ + begin);
    for (int64_t i = begin; i < begin + n; ++i) {
      k_[i] = t_.normalize ? rate_ * norm_q(0, i) : rate_;
      positive_[i] = positive_[i] * norm_d(0, t_.positives[i]);
      b_[i] = -positive_[i] * k_[i];
    }
  });
}

void InfoNCEFused::Scratch::reserve(int64_t most_rows, int64_t chunk, int64_t padded, bool gradients) {
  const int64_t row_bytes = most_rows * padded * 2, bytes = gradients ? 3 * row_bytes + chunk * padded * 2 : row_bytes;
  if (bytes > size) memory = WorkBuffer(bytes), size = bytes;
  rows = memory.data();
  sums = gradients ? reinterpret_cast<float*>(rows + row_bytes) : nullptr;
  products = gradients ? rows + 3 * row_bytes : nullptr;
  cursors.resize(most_rows);
}

// The excluded pairs of a panel and the chunk of columns begin .. begin + count, and those of the columns that fill up
// the last tile.
void InfoNCEFused::collect(Scratch& s, int64_t first_row, int64_t rows, int64_t begin, int64_t count) const {
  s.excluded.clear(), s.active.clear();
  Cursor* cursors = s.cursors.data() + first_row;
  for (int64_t r = 0; r < rows; ++r)
    if (cursors[r].next < cursors[r].end && *cursors[r].next < begin + count)
      s.active.push_back(static_cast<int32_t>(r));
  for (int64_t column = 0; column < count && !s.active.empty(); column += 32)
    for (const int32_t r : s.active)
      for (Cursor& c = cursors[r]; c.next < c.end && *c.next < begin + std::min(column + 32, count); ++c.next)
        s.excluded.push_back(static_cast<int32_t>((*c.next - begin) * 32 + r));
  for (int64_t column = count; column % 32 != 0; ++column)
    for (int64_t r = 0; r < fused_.rows; ++r) s.excluded.push_back(static_cast<int32_t>(column * 32 + r));
}

template <class ListOf, class Multiply, class Finish>
void InfoNCEFused::sweep(const Side& rows, const Side& columns, const ListOf& list_of, const Multiply& multiply,
                         const Finish& finish) {
  const int64_t height = fused_.rows, width = t_.width, panel = padded_ * height;
  const int64_t chunk = std::min<int64_t>(fused_.max_columns, group_);
  const int64_t most = std::max(round_down(kTaskBytes / (6 * padded_), height), height);  // rows of a task
  const int64_t tasks = round_up(ceil_div(rows.count, most), std::max(t_.threads, 1));
  const int64_t task_rows = round_up(ceil_div(rows.count, tasks), height);
  for (int64_t first = 0; first < columns.count && !stopped(0); first += group_) {
    const int64_t end = std::min(first + group_, columns.count);
    const bool last = end == columns.count;
    parallel_for(ceil_div(end - first, chunk), t_.threads, [&](int64_t index, int) {
      const StageScope pack(Stage::pack);
      for (int64_t c = first + index * chunk; c < std::min(first + (index + 1) * chunk, end); c += height)
        fused_.pack_columns(row_of(columns.rows, c), width, std::min(height, end - c), width,
                            columns_.data() + (c - first) * padded_ * 2);
    });
    parallel_for(ceil_div(rows.count, task_rows), t_.threads, [&](int64_t task, int thread) {
      if (stopped(thread)) return;
      Scratch& s = scratch_[thread];
      s.reserve(task_rows, chunk, padded_, gradients_);
      const int64_t begin = task * task_rows, n = std::min(task_rows, rows.count - begin);
      {
        const StageScope pack(Stage::pack);
        for (int64_t r = 0; r < n; r += height)
          fused_.pack_rows(row_of(rows.rows, begin + r), width, std::min(height, n - r), width,
                           s.rows + r * padded_ * 2);
        if (gradients_ && first == 0) std::fill_n(s.sums, round_up(n, height) * padded_, 0.0f);
        for (int64_t r = 0; r < n; ++r) {
          const auto [items, items_end] = list_of(begin + r);
          s.cursors[r] = {std::lower_bound(items, items_end, static_cast<int32_t>(first)), items_end};
          if (gradients_ && first > 0)
            fused_.write_sums(rows.gradient + (begin + r) * width, r % height, width, s.sums + r / height * panel);
        }
      }
      for (int64_t c = first; c < end && !stopped(thread); c += chunk) {
        const int64_t count = std::min(chunk, end - c);
        const char* packed = columns_.data() + (c - first) * padded_ * 2;
        if (gradients_) {
          const StageScope pack(Stage::pack);
          fused_.pair_columns(packed, count, width, s.products);
        }
        const StageScope multiply_stage(Stage::multiply);
        const TileScope scope(fused_);  // not around stopped(): a signal's handler may use tiles of its own
        for (int64_t r = 0; r < n; r += height) {
          collect(s, r, std::min(height, n - r), c, count);
          multiply({.rows = s.rows + r * padded_ * 2,
                    .columns = packed,
                    .products = s.products,
                    .width = width,
                    .count = count,
                    .excluded = s.excluded.data(),
                    .excluded_count = static_cast<int64_t>(s.excluded.size()),
                    .sums = gradients_ ? s.sums + r * padded_ : nullptr},
                   begin + r, c);
        }
      }
      const StageScope finish_stage(Stage::finish);
      for (int64_t r = 0; r < n; ++r) {
        const auto read = [&](float factor) {
          float* gradient = rows.gradient + (begin + r) * width;
          fused_.read_sums(s.sums + r / height * panel, r % height, width, factor, gradient);
          return gradient;
        };
        if (last)
          finish(begin + r, read, thread);
        else if (gradients_)
          read(1.0f);
      }
    });
  }
}

// The loss of query i, and its gradient: read(factor) gives factor times its row of E D, in place.
template <class Read>
void InfoNCEFused::finish_query(int64_t i, const Read& read, int thread) {
  const int64_t positive = t_.positives[i];
  std::vector<float> memory(2 * private_pitch_);
  const Private own{memory.data(), memory.data() + private_pitch_, private_pitch_};
  float* rows = scratch(thread) + t_.width;  // the first is score_private's
  const float* q = t_.hards > 0 || t_.normalize ? load(t_.q, i, 1, rows) : nullptr;
  // sums over the negatives relative to y = 0, from base 2 to base e
  constexpr double kLog2 = std::numbers::ln2;
  double sums[2] = {total_[i], moment_[i] * kLog2}, scale = 1;
  double shift = (static_cast<double>(positive_[i]) * k_[i] + b_[i]) * kLog2;
  const ScoreRow hard = {own.scores, nullptr, private_pitch_, 0, kInfinity};
  float top = 0;
  if (t_.hards > 0) {  // the score of y = 0, or the largest private one
    score_private(i, q, own, thread);
    const double zero = -static_cast<double>(b_[i]) / rate_;
    top = std::max(static_cast<float>(zero), loss_.top(hard));
    const double delta = (zero - top) * scale_;
    scale = std::exp(delta);
    sums[1] = (sums[1] + delta * sums[0]) * scale, sums[0] *= scale, shift += delta;
    loss_.sums(hard, scale_, top, sums);
  }
  const Weights weights = softmax(i, 0, shift, sums);
  if (!gradients_) return;
  const float norm = norm_q(0, i), factor = static_cast<float>(weights.factor * scale) * norm;
  factor_[i] = factor, own_[i] = weights.positive * norm;
  ceiling_[i] = std::fma(positive_[i], k_[i], b_[i]) + t_.margin * rate_;
  float* gradient = read(factor);
  loss_.axpy(own_[i] * norm_d(0, positive), load(t_.d, positive, 1, rows + t_.width), gradient, t_.width);
  if (t_.hards > 0) {
    loss_.weights(hard, scale_, top, weights.factor, own.weights);
    finish_private(i, q, own, thread);
  }
  if (!t_.normalize) return;
  loss_.axpy(-radial_part(loss_.dot(gradient, q, t_.width), norm), q, gradient, t_.width);
}

// The gradient of document j: read(factor) gives factor times its row of G^T Q, in place.
template <class Read>
void InfoNCEFused::finish_document(int64_t j, const Read& read, int thread) {
  const float norm = norm_d(0, j);
  float *row = scratch(thread), *gradient = read(norm);
  for (int64_t n = owners_.first[j]; n < owners_.first[j + 1]; ++n) {
    const int64_t i = owners_.items[n];
    loss_.axpy(own_[i] * norm, load(t_.q, i, 1, row), gradient, t_.width);
  }
  if (!t_.normalize) return;
  const float* d = load(t_.d, j, 1, row);
  loss_.axpy(-radial_part(loss_.dot(gradient, d, t_.width), norm), d, gradient, t_.width);
}

Status InfoNCEFused::run() {
  if (Status inputs = check_inputs(); !inputs) return inputs;
  if (t_.normalize) {
    find_norms();
    std::copy_n(norm_d_ + 0, t_.columns, norms_ + 0);
  }
  index_documents();
  const auto id_of_query = [&](int64_t i) { return ids_[t_.positives[i]]; };
  documents_of_ = group(t_.columns, t_.columns, [&](int64_t j) { return ids_[j]; });
  score_positives();
  const auto list = [](const Lists& lists, int64_t key) {
    return std::pair(lists.items.data() + lists.first[key], lists.items.data() + lists.first[key + 1]);
  };
  const Side q{t_.q, t_.rows, t_.grad_q}, d{t_.d, t_.columns, t_.grad_d};
  sweep(
      q, d, [&](int64_t i) { return list(documents_of_, id_of_query(i)); },
      [&](const FusedOperands& operands, int64_t row, int64_t column) {
        fused_.queries(operands, {.k = k_ + row,
                                  .b = b_ + row,
                                  .positive = positive_ + row,
                                  .total = total_ + row,
                                  .moment = moment_ + row,
                                  .norms = t_.normalize ? norms_ + column : nullptr,
                                  .margin = t_.margin * rate_});
      },
      [&](int64_t i, const auto& read, int thread) { finish_query(i, read, thread); });
  if (gradients_ && !stopped(0)) {
    queries_of_ = group(t_.rows, t_.columns, id_of_query);
    owners_ = group(t_.rows, t_.columns, [&](int64_t i) { return t_.positives[i]; });
    sweep(
        d, q, [&](int64_t j) { return list(queries_of_, ids_[j]); },
        [&](const FusedOperands& operands, int64_t row, int64_t column) {
          fused_.documents(operands, {.k = k_ + column,
                                      .b = b_ + column,
                                      .factor = factor_ + column,
                                      .ceiling = margin_ ? ceiling_ + column : nullptr,
                                      .norms = t_.normalize ? norms_ + row : nullptr});
        },
        [&](int64_t j, const auto& read, int thread) { finish_document(j, read, thread); });
    *t_.grad_temperature = static_cast<float>(std::accumulate(tau_ + 0, tau_ + t_.rows, 0.0));
  }
  return stopped(0) ? Status{Code::interrupted} : check_losses();
}

}  // namespace refine_fast
