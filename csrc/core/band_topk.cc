#include "core/band_topk.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

#include "core/cpu.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/stages.h"
#include "core/tile_scope.h"

namespace refine_fast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallestNorm = 1e-12;   // eps of torch.nn.functional.normalize: a zero row stays zero
constexpr size_t kPrefetchDocuments = 4;  // prefetch distance while rescoring
constexpr int64_t kSlack = 16;            // SelectKernels::append writes up to a vector beyond

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// the largest float <= x, and the smallest >= x
float down(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f;
}
float up(double x) { return -down(-x); }

bool better(const Hit& a, const Hit& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

Status bad_row(const char* which, int64_t row, const char* what, bool finite) {
  Status status{Code::invalid};
  std::snprintf(status.message, sizeof(status.message), "%s %lld of %s %s", which, static_cast<long long>(row), what,
                finite ? "has a norm above 1e18; scale the rows, or pass normalize=True"
                       : "holds NaN or Inf; leave such rows out");
  return status;
}

}  // namespace

BandSearch::Plan::Plan(const BandSpec& spec, const ScreenKernels& screen) {
  const int64_t depth = round_up(spec.d, screen.kr) * screen.element_bytes + screen.scale_bytes;
  panel_a = round_up(screen.mr * depth, 64), panel_b = round_up(screen.nr * depth, 64);
  strip = std::max<int64_t>(std::min<int64_t>((256 << 10) / depth, 4096 / screen.mr) / screen.nr, 1) * screen.nr;
  block = std::max(std::max<int64_t>((6 << 20) / depth / strip, 1) * strip, round_up(spec.largest, strip));
  kept = spec.random ? spec.skip : spec.k + spec.skip;
  drawn = spec.random ? spec.k + spec.skip : 0;
  pending = strip + kSlack + std::max<int64_t>(256, kept / 4);
  bytes_per_query = spec.d * 4 + panel_a / screen.mr + (kept + drawn) * static_cast<int64_t>(sizeof(Hit)) +
                    pending * 8 + static_cast<int64_t>(sizeof(Query));
  const int64_t scratch = (std::max(screen.nr, screen.mr) * spec.d + screen.mr * strip) * 4 + pending * sizeof(Doubt);
  bytes_fixed = block / screen.nr * panel_b + block * 12 + scratch * spec.threads;
}

int64_t BandSearch::queries_within(const BandSpec& spec, int64_t bytes) {
  const ScreenKernels& screen = *kernels().screen;
  const Plan plan(spec, screen);
  const int64_t rows = std::max<int64_t>((bytes - plan.bytes_fixed) / plan.bytes_per_query, 1);
  return rows < screen.mr ? rows : rows / screen.mr * screen.mr;
}

BandSearch::BandSearch(const BandSpec& spec, int64_t first, int64_t rows, const double* hi, Ragged exclude)
    : spec_(spec),
      kernels_(kernels()),
      screen_(*kernels_.screen),
      plan_(spec, screen_),
      first_(first),
      rows_(rows),
      hi_(hi),
      exclude_(exclude),
      queries_(static_cast<size_t>(rows * spec.d)),
      state_(static_cast<size_t>(rows)),
      hits_(static_cast<size_t>(rows * plan_.kept)),
      drawn_(static_cast<size_t>(rows * plan_.drawn)),
      pending_column_(static_cast<size_t>(rows * plan_.pending)),
      pending_score_(static_cast<size_t>(rows * plan_.pending)),
      norms_(static_cast<size_t>(plan_.block)),
      residuals_(static_cast<size_t>(plan_.block)),
      packed_queries_(ceil_div(rows, screen_.mr) * plan_.panel_a),
      packed_documents_(plan_.block / screen_.nr * plan_.panel_b),
      scratch_(static_cast<size_t>(std::max(spec.threads, 1))) {
  for (Scratch& scratch : scratch_) {
    scratch.rows.resize(static_cast<size_t>(std::max(screen_.nr, screen_.mr) * spec.d));
    scratch.strip.resize(static_cast<size_t>(screen_.mr * plan_.strip));
    scratch.doubts.reserve(static_cast<size_t>(plan_.pending));
  }
}

// Packs `count` rows into one panel of the screen and reports on each. float32 rows are read in place, others are
// converted in scratch.
void BandSearch::pack(const Rows& rows, int64_t count, PackPanel pack, char* panel, Scratch& scratch,
                      Operand* operands) const {
  const int64_t d = spec_.d;
  const bool copied = rows.dtype != Dtype::f32 || spec_.normalize;
  const int64_t stride = copied ? d : rows.row_bytes / 4;
  float* const copy = scratch.rows.data();
  double size[kLargestPanel] = {}, residual[kLargestPanel] = {};
  for (int64_t r = 0; r < count; ++r) {
    const float* x = reinterpret_cast<const float*>(rows.data + r * rows.row_bytes);
    if (rows.dtype != Dtype::f32) kernels_.to_f32(x, rows.dtype, d, copy + r * d), x = copy + r * d;
    Operand& operand = operands[r];
    const double norm2 = kernels_.select->dot(x, x, d), norm = std::sqrt(norm2);
    operand.norm = spec_.normalize ? std::max(norm, kSmallestNorm) : 1.0;
    operand.size = size[r] = norm / operand.norm * (1 + 0x1p-20);
    operand.finite = std::isfinite(norm2);
    if (spec_.normalize) {
      const double unit = 1 / operand.norm;
      for (int64_t i = 0; i < d; ++i) copy[r * d + i] = static_cast<float>(x[i] * unit);
    }
  }
  pack(copied ? copy : reinterpret_cast<const float*>(rows.data), stride, count, d, size, panel, residual);
  // `sum` covers the kernel's float32 sum of squares, `scaled` the rounding of x / norm to float32
  const double sum = 1 + static_cast<double>(d + 16) * 0x1p-23, scaled = spec_.normalize ? 0x1p-23 : 0.0;
  for (int64_t r = 0; r < count; ++r) operands[r].residual = std::sqrt(residual[r]) * sum + scaled * operands[r].size;
}

Status BandSearch::set_queries(const void* queries, Dtype dtype, int64_t row_stride) {
  const StageScope pack_stage(Stage::pack);
  const int64_t d = spec_.d, row_bytes = row_stride * bytes_of(dtype);
  Operand operands[kLargestPanel];
  for (int64_t row = 0; row < rows_; ++row) {
    kernels_.to_f32(static_cast<const char*>(queries) + row * row_bytes, dtype, d, queries_.data() + row * d);
    const int64_t lane = row % screen_.mr;
    if (lane < screen_.mr - 1 && row < rows_ - 1) continue;
    const int64_t begin = row - lane;
    const Rows rows{reinterpret_cast<const char*>(queries_.data() + begin * d), Dtype::f32, d * 4};
    pack(rows, lane + 1, screen_.pack_a, packed_queries_ + begin / screen_.mr * plan_.panel_a, scratch_[0], operands);
    for (int64_t r = begin; r <= row; ++r) {
      const Operand& operand = operands[r - begin];
      if (!operand.usable()) return bad_row("row", first_ + r, "queries", operand.finite);
      Query& query = state_[r];
      query = {};
      query.reach = operand.size + operand.residual, query.residual = operand.residual, query.norm = operand.norm;
      query.worst = plan_.kept == 0 ? kInfinity : -kInfinity;
      query.hash = hash_query(spec_.seed, first_ + r);
      query.next_excluded = exclude_.offsets == nullptr ? 0 : exclude_.offsets[r];
    }
  }
  return {};
}

Status BandSearch::pack_documents(Block& block) {
  const StageScope pack_stage(Stage::pack);
  struct Panel {
    double size, residual;  // the largest
    int64_t bad;            // the first row that cannot be used, or -1
    bool finite;
  };
  const int64_t count = ceil_div(block.rows, screen_.nr);
  std::vector<Panel> panels(static_cast<size_t>(count));
  parallel_for(count, spec_.threads, [&](int64_t index, int thread) {
    Operand operands[kLargestPanel];
    const int64_t begin = index * screen_.nr, rows = std::min<int64_t>(screen_.nr, block.rows - begin);
    const Rows source{block.docs.data + begin * block.docs.row_bytes, block.docs.dtype, block.docs.row_bytes};
    pack(source, rows, screen_.pack_b, packed_documents_ + index * plan_.panel_b, scratch_[thread], operands);
    Panel& panel = panels[index] = {0, 0, -1, true};
    for (int64_t r = rows; r-- > 0;) {
      const Operand& operand = operands[r];
      if (!operand.usable()) panel.bad = begin + r, panel.finite = operand.finite;
      norms_[begin + r] = operand.norm, residuals_[begin + r] = up(operand.residual);
      panel.size = std::max(panel.size, operand.size), panel.residual = std::max(panel.residual, operand.residual);
    }
  });
  block.size = block.residual = 0;
  for (const Panel& panel : panels) {
    if (panel.bad >= 0)
      return bad_row(block.offsets == nullptr ? "row" : "a row of group", block.first_id + block.document_of(panel.bad),
                     "docs", panel.finite);
    block.size = std::max(block.size, panel.size), block.residual = std::max(block.residual, panel.residual);
  }
  if (block.offsets == nullptr) return {};
  for (int64_t document = 0; document < block.documents; ++document)
    residuals_[document] =
        *std::max_element(&residuals_[block.row_of(document)], residuals_.data() + block.row_of(document + 1));
  return {};
}

void BandSearch::set_thresholds(Query& query, double hi, const Block& block) const {
  BandThresholds& t = query.thresholds;
  const double lo = spec_.lo, e = query.margin_of(block.residual);
  if (!(lo <= hi)) {
    t.floor = t.sure = t.keep = t.ceil = std::numeric_limits<float>::infinity();
    return;
  }
  const bool saturated = spec_.order == Order::band_then_skip || query.above >= spec_.skip;
  t.floor = down(lo - e);
  t.ceil = saturated ? up(hi + e) : std::numeric_limits<float>::infinity();
  t.sure = spec_.random ? t.floor : up(lo + e);
  t.keep = spec_.random ? t.floor : std::max(t.sure, std::min(down(query.worst - e), down(hi - e)));
}

void BandSearch::prefetch(int64_t column, const Block& block) const {
  for (int64_t r = block.row_of(column); r < block.row_of(column + 1); ++r) {
    const char* row = block.docs.data + r * block.docs.row_bytes;
    for (int64_t byte = 0; byte < spec_.d * bytes_of(block.docs.dtype); byte += 64) __builtin_prefetch(row + byte);
  }
}

double BandSearch::exact(int64_t row, int64_t column, const Block& block, Scratch& scratch) const {
  double best = -kInfinity;
  for (int64_t r = block.row_of(column); r < block.row_of(column + 1); ++r) {
    const char* source = block.docs.data + r * block.docs.row_bytes;
    const float* document = reinterpret_cast<const float*>(source);
    if (block.docs.dtype != Dtype::f32) {
      kernels_.to_f32(source, block.docs.dtype, spec_.d, scratch.rows.data());
      document = scratch.rows.data();
    }
    const double s = kernels_.select->dot(queries_.data() + row * spec_.d, document, spec_.d);
    best = std::max(best, spec_.normalize ? s / (state_[row].norm * norms_[r]) : s);
  }
  return best;
}

uint64_t BandSearch::hash(const Query& query, int64_t id) const { return hash_document(query.hash, id); }

// Adds a hit to a heap of the `limit` first hits, whose top is the last of them.
template <class Before>
void BandSearch::offer(Hit* heap, int32_t& size, int64_t limit, Hit hit, Before before) {
  if (size == limit) {
    if (size == 0 || !before(hit, heap[0])) return;
    std::pop_heap(heap, heap + size, before);
    heap[size - 1] = hit;
  } else {
    heap[size++] = hit;
  }
  std::push_heap(heap, heap + size, before);
}

// Settles the pending documents of a query: counts them, rescores those that may be chosen, keeps the best.
void BandSearch::flush(int64_t row, const Block& block, Scratch& scratch) {
  Query& query = state_[row];
  const int32_t* column = pending_column_.data() + row * plan_.pending;
  const float* score = pending_score_.data() + row * plan_.pending;
  Hit* const hits = hits_.data() + row * plan_.kept;
  Hit* const drawn = drawn_.data() + row * plan_.drawn;
  const double lo = spec_.lo, hi = hi_[row];
  const auto luckier = [&](const Hit& a, const Hit& b) { return hash(query, a.id) < hash(query, b.id); };
  std::vector<Doubt>& doubts = scratch.doubts;
  doubts.clear();
  for (int32_t i = 0; i < query.pending; ++i) {
    const double s = score[i], e = query.margin_of(residuals_[column[i]]);
    if (s > hi + e) {
      ++query.above;
    } else if (s < lo + e || s > hi - e) {
      if (s >= lo - e) doubts.push_back({kInfinity, column[i]});
    } else {
      ++query.inside;
      if (spec_.random || s + e >= query.worst) doubts.push_back({s + e, column[i]});
    }
  }
  query.pending = 0;
  const StageScope rescore(Stage::rescore);
  for (size_t i = 0; i < doubts.size(); ++i) {
    if (i + kPrefetchDocuments < doubts.size()) prefetch(doubts[i + kPrefetchDocuments].column, block);
    const Doubt& doubt = doubts[i];
    Hit hit{doubt.most, block.first_id + doubt.column};
    const bool similar = doubt.most >= query.worst;
    const bool lucky = spec_.random && (query.drawn < plan_.drawn || (query.drawn > 0 && luckier(hit, drawn[0])));
    if (!similar && !lucky) continue;
    hit.score = exact(row, doubt.column, block, scratch);
    if (doubt.most == kInfinity) {
      if (hit.score > hi) ++query.above;
      if (hit.score > hi || hit.score < lo) continue;
      ++query.inside;
    }
    offer(hits, query.kept, plan_.kept, hit, better);
    offer(drawn, query.drawn, plan_.drawn, hit, luckier);
    if (plan_.kept > 0 && query.kept == plan_.kept) query.worst = hits[0].score;
  }
  set_thresholds(query, hi, block);
}

// Replaces the scores of the rows from `start`, of which `document` has the first, by those of the documents that end
// among them, and returns their number.
int64_t BandSearch::fold(float* scores, int64_t start, int64_t columns, int64_t document, const Block& block,
                         float& open) {
  const int64_t first = document, end = start + columns;
  float best = start > block.row_of(document) ? open : -std::numeric_limits<float>::infinity();
  for (int64_t row = start; row < end;) {
    const int64_t next = block.row_of(document + 1), last = std::min(next, end);
    for (; row < last; ++row) best = std::max(best, scores[row - start]);
    if (row < next) break;
    scores[document++ - first] = best;
    best = -std::numeric_limits<float>::infinity();
  }
  open = best;
  return document - first;
}

// Scores a panel of queries against the strip of documents at `start`, and appends to the pending lists.
void BandSearch::screen(int64_t panel, int64_t start, const Block& block, Scratch& scratch) {
  const int64_t columns = std::min(plan_.strip, block.rows - start), first_row = panel * screen_.mr;
  const int64_t first = block.document_of(start);
  const int64_t last_row = std::min<int64_t>(first_row + screen_.mr, rows_);
  const char* a = packed_queries_ + panel * plan_.panel_a;
  float* scores = scratch.strip.data();
  {
    const StageScope multiply(Stage::multiply);
    const TileScope scope(screen_);
    for (int64_t j = 0; j < columns; j += screen_.nr)
      screen_.tile(a, packed_documents_ + (start + j) / screen_.nr * plan_.panel_b, spec_.d, scores + j, plan_.strip);
  }
  for (int64_t row = first_row; row < last_row; ++row, scores += plan_.strip) {
    Query& query = state_[row];
    const int64_t documents =
        block.offsets == nullptr ? columns : fold(scores, start, columns, first, block, query.open);
    if (exclude_.offsets != nullptr) {
      const int64_t begin = block.first_id + first, end = exclude_.offsets[row + 1];
      for (int64_t& next = query.next_excluded; next < end && exclude_.ids[next] < begin + documents; ++next)
        if (exclude_.ids[next] >= begin) scores[exclude_.ids[next] - begin] = std::numeric_limits<float>::quiet_NaN();
    }
    if (query.pending + documents + kSlack > plan_.pending) flush(row, block, scratch);
    const int64_t at = row * plan_.pending + query.pending;
    query.pending +=
        static_cast<int32_t>(kernels_.select->append(scores, documents, &query.thresholds, static_cast<int32_t>(first),
                                                     &pending_column_[at], &pending_score_[at], &query.inside));
  }
}

Status BandSearch::push(const void* docs, Dtype dtype, int64_t row_stride, int64_t count, int64_t first_id, Poll poll,
                        const int64_t* offsets) {
  using Clock = std::chrono::steady_clock;
  const int64_t row_bytes = row_stride * bytes_of(dtype), panels = ceil_div(rows_, screen_.mr);
  // a task: a range of panels of queries against the whole block, strip by strip; one task more or less is 3% of a
  // thread's work
  const int64_t tasks = 32 * std::max(spec_.threads, 1), group = ceil_div(panels, tasks);
  const double d = static_cast<double>(spec_.d), rounding = (screen_.exact ? 4 : d + 16) * 0x1p-23;
  std::atomic<bool> stopped{false};
  Clock::time_point asked = Clock::now();
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t first = begin, last = end = std::min(begin + plan_.block, count);  // rows
    if (offsets != nullptr) {
      end = std::upper_bound(offsets + begin, offsets + count + 1, offsets[begin] + plan_.block) - offsets - 1;
      first = offsets[begin] - offsets[0], last = offsets[end] - offsets[0];
    }
    const Rows source{static_cast<const char*>(docs) + first * row_bytes, dtype, row_bytes};
    Block block{source, last - first, end - begin, first_id + begin, offsets == nullptr ? nullptr : offsets + begin, 0,
                0};
    if (Status status = pack_documents(block); !status) return status;
    const StageScope select(Stage::select);
    parallel_for(ceil_div(panels, group), spec_.threads, [&](int64_t task, int thread) {
      Scratch& scratch = scratch_[thread];
      const int64_t first_panel = task * group, last_panel = std::min(panels, first_panel + group);
      const int64_t first_row = first_panel * screen_.mr, last_row = std::min(rows_, last_panel * screen_.mr);
      for (int64_t row = first_row; row < last_row; ++row) {
        Query& query = state_[row];
        const double x = query.reach, y = block.size + block.residual;
        // 1e-36: for denormals that a bf16 product flushes to zero
        query.margin = query.residual * block.size + rounding * x * y + 1e-36 * d * (1 + x) * (1 + y);
        set_thresholds(query, hi_[row], block);
      }
      for (int64_t start = 0; start < block.rows && !stopped.load(std::memory_order_relaxed); start += plan_.strip) {
        if (thread == 0 && poll.go_on != nullptr && Clock::now() - asked > std::chrono::milliseconds(50)) {
          if (!poll.go_on(poll.context)) stopped = true;
          asked = Clock::now();
        }
        for (int64_t panel = first_panel; panel < last_panel; ++panel) screen(panel, start, block, scratch);
      }
      for (int64_t row = first_row; row < last_row; ++row)
        if (state_[row].pending > 0) flush(row, block, scratch);
    });
    if (stopped) return Status{Code::interrupted};
  }
  return {};
}

void BandSearch::finish(int64_t* ids, float* scores, int64_t* in_band) {
  const StageScope finish(Stage::finish);
  const int64_t k = spec_.k;
  parallel_for(rows_, spec_.threads, [&](int64_t row, int) {
    const Query& query = state_[row];
    Hit *const hits = hits_.data() + row * plan_.kept, *const hits_end = hits + query.kept;
    Hit *const drawn = drawn_.data() + row * plan_.drawn, *drawn_end = drawn + query.drawn;
    std::sort(hits, hits_end, better);
    const int64_t skipped =
        spec_.order == Order::band_then_skip ? spec_.skip : spec_.skip - std::min(query.above, spec_.skip);
    in_band[row] = std::max<int64_t>(0, query.inside - skipped);
    const Hit* chosen = hits + std::min<int64_t>(skipped, query.kept);
    int64_t found = std::min<int64_t>(k, hits_end - chosen);
    if (spec_.random) {
      drawn_end =
          std::remove_if(drawn, drawn_end, [&](const Hit& hit) { return chosen > hits && !better(chosen[-1], hit); });
      std::sort(drawn, drawn_end, [&](const Hit& a, const Hit& b) { return hash(query, a.id) < hash(query, b.id); });
      chosen = drawn, found = std::min<int64_t>(k, drawn_end - drawn);
      std::sort(drawn, drawn + found, better);
    }
    for (int64_t i = 0; i < k; ++i) {
      ids[row * k + i] = i < found ? chosen[i].id : -1;
      scores[row * k + i] = i < found ? static_cast<float>(chosen[i].score) : std::numeric_limits<float>::quiet_NaN();
    }
  });
}

void BandSearch::finish_part(const BandPart& part) {
  const StageScope finish(Stage::finish);
  const auto write = [](const Hit* hits, int64_t count, int64_t room, int64_t* ids, double* scores) {
    for (int64_t i = 0; i < room; ++i) {
      ids[i] = i < count ? hits[i].id : -1;
      scores[i] = i < count ? hits[i].score : std::numeric_limits<double>::quiet_NaN();
    }
  };
  parallel_for(rows_, spec_.threads, [&](int64_t row, int) {
    const Query& query = state_[row];
    Hit* const hits = hits_.data() + row * plan_.kept;
    Hit* const drawn = drawn_.data() + row * plan_.drawn;
    std::sort(hits, hits + query.kept, better);
    std::sort(drawn, drawn + query.drawn,
              [&](const Hit& a, const Hit& b) { return hash(query, a.id) < hash(query, b.id); });
    write(hits, query.kept, plan_.kept, part.ids + row * plan_.kept, part.scores + row * plan_.kept);
    write(drawn, query.drawn, plan_.drawn, part.drawn_ids + row * plan_.drawn, part.drawn_scores + row * plan_.drawn);
    part.above[row] = spec_.order == Order::band_then_skip ? 0 : std::min(query.above, spec_.skip);
    part.in_band[row] = query.inside;
  });
}

}  // namespace refine_fast
