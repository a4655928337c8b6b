#include "core/band_topk.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

#include "core/band_scores.h"
#include "core/cpu.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/stages.h"
#include "core/tile_scope.h"

namespace refine_fast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallestNorm = 1e-12;  // eps of torch.nn.functional.normalize: a zero row stays zero
constexpr int64_t kTurns = 16;           // ScreenRun::ahead
constexpr int64_t kTask = 768 << 10;     // bytes of packed queries that stay in L2 while documents pass by

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
  runs = screen.run != nullptr && spec.largest == 1;
  if (runs) strip = std::max<int64_t>((384 << 10) / panel_b, 1) * screen.nr;
  block = std::max(std::max<int64_t>((6 << 20) / depth / strip, 1) * strip, round_up(spec.largest, strip));
  kept = spec.random ? spec.skip : spec.k + spec.skip;
  drawn = spec.random ? spec.k + spec.skip : 0;
  may_wait = std::max<int64_t>(runs ? 464 : 256, kept / 4);
  waiting = may_wait + (runs ? screen.nr : strip) + kSlack;
  bytes_per_query = spec.d * 4 + panel_a / screen.mr + (kept + drawn) * static_cast<int64_t>(sizeof(Hit)) +
                    waiting * 8 + static_cast<int64_t>(sizeof(Query) + sizeof(BandList));
  const int64_t scratch = (std::max(screen.nr, screen.mr) * spec.d + screen.mr * strip + waiting + kept + block) * 4 +
                          (kBatch + waiting) * static_cast<int64_t>(sizeof(Waiting) + sizeof(double));
  bytes_fixed = block / screen.nr * panel_b + block * (spec.normalize ? 16 : 8) + scratch * spec.threads;
}

int64_t BandSearch::queries_within(const BandSpec& spec, int64_t bytes) {
  const ScreenKernels& screen = *kernels().screen;
  const Plan plan(spec, screen);
  // However much the threads and the largest group take, a search of too few queries would pack all documents for them.
  const int64_t left = std::max(bytes - plan.bytes_fixed, bytes / 4);
  const int64_t rows = std::max<int64_t>(left / plan.bytes_per_query, 1);
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
      queries_(rows * spec.d),
      state_(static_cast<size_t>(rows)),
      lists_(static_cast<size_t>(round_up(rows, screen_.mr))),
      hits_(rows * plan_.kept),
      drawn_(rows * plan_.drawn),
      waiting_column_(rows * plan_.waiting),
      waiting_score_(rows * plan_.waiting),
      bounds_(plan_.block),
      norms_(spec.normalize ? plan_.block : 0),
      packed_queries_(ceil_div(rows, screen_.mr) * plan_.panel_a),
      packed_documents_(plan_.block / screen_.nr * plan_.panel_b),
      strips_(std::max(spec.threads, 1) * screen_.mr * plan_.strip),
      scratch_(static_cast<size_t>(std::max(spec.threads, 1))) {
  float* strip = strips_.data();
  for (Scratch& scratch : scratch_) {
    scratch.rows.resize(static_cast<size_t>(std::max(screen_.nr, screen_.mr) * spec.d));
    scratch.strip = strip, strip += screen_.mr * plan_.strip;
    scratch.least.reserve(static_cast<size_t>(plan_.waiting + plan_.kept));
  }
  constexpr float kNever = std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < static_cast<int64_t>(lists_.size()); ++row) {
    const int64_t at = std::min(row, rows - 1) * plan_.waiting;
    lists_[row] = {{kNever, kNever, kNever, kNever}, waiting_column_ + at, waiting_score_ + at, 0, 0};
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
    pack(rows, lane + 1, screen_.pack_a, packed_queries_.data() + begin / screen_.mr * plan_.panel_a, scratch_[0],
         operands);
    for (int64_t r = begin; r <= row; ++r) {
      const Operand& operand = operands[r - begin];
      if (!operand.usable()) return bad_row("row", first_ + r, "queries", operand.finite);
      Query& query = state_[r];
      query = {};
      const double x = operand.size + operand.residual,
                   rounding = static_cast<double>(screen_.exact ? 4 : d + 16) * 0x1p-23;
      // 1e-36: for denormals that a bf16 product flushes to zero
      query.norm = operand.norm, query.least = 1e-36 * static_cast<double>(d) * (1 + x);
      query.per_size = operand.residual + rounding * x + query.least;
      query.per_residual = x + rounding * x + query.least;
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
    Bound largest;
    int64_t bad;  // the first row that cannot be used, or -1
    bool finite;
  };
  const int64_t count = ceil_div(block.rows, screen_.nr);
  std::vector<Panel> panels(static_cast<size_t>(count));
  parallel_for(count, spec_.threads, [&](int64_t index, int thread) {
    Operand operands[kLargestPanel];
    const int64_t begin = index * screen_.nr, rows = std::min<int64_t>(screen_.nr, block.rows - begin);
    const Rows source{block.docs.data + begin * block.docs.row_bytes, block.docs.dtype, block.docs.row_bytes};
    pack(source, rows, screen_.pack_b, packed_documents_.data() + index * plan_.panel_b, scratch_[thread], operands);
    Panel& panel = panels[index] = {{}, -1, true};
    for (int64_t r = rows; r-- > 0;) {
      const Operand& operand = operands[r];
      if (!operand.usable()) panel.bad = begin + r, panel.finite = operand.finite;
      if (spec_.normalize) norms_[begin + r] = operand.norm;
      bounds_[begin + r] = {up(operand.size), up(operand.residual)};
      panel.largest.widen(bounds_[begin + r]);
    }
  });
  block.largest = {};
  for (const Panel& panel : panels) {
    if (panel.bad >= 0)
      return bad_row(block.offsets == nullptr ? "row" : "a row of group", block.first_id + block.document_of(panel.bad),
                     "docs", panel.finite);
    block.largest.widen(panel.largest);
  }
  if (block.offsets == nullptr) return {};
  for (int64_t document = 0; document < block.documents; ++document) {
    Bound bound;
    for (int64_t row = block.row_of(document); row < block.row_of(document + 1); ++row) bound.widen(bounds_[row]);
    bounds_[document] = bound;
  }
  return {};
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

// Calls mark(i) for each document first_id + i with i < count that the query excludes.
template <class Mark>
void BandSearch::for_each_excluded(int64_t row, int64_t first_id, int64_t count, const Mark& mark) {
  if (exclude_.offsets == nullptr) return;
  const int64_t end = exclude_.offsets[row + 1];
  for (int64_t& next = state_[row].next_excluded; next < end && exclude_.ids[next] < first_id + count; ++next)
    if (exclude_.ids[next] >= first_id) mark(exclude_.ids[next] - first_id);
}

// Scores a panel of queries against the strip of documents at `start`, and appends to the lists of what waits.
void BandSearch::screen(int64_t panel, int64_t start, const Block& block, Scratch& scratch) {
  const int64_t columns = std::min(plan_.strip, block.rows - start), first_row = panel * screen_.mr;
  const int64_t first = block.document_of(start);
  const int64_t last_row = std::min<int64_t>(first_row + screen_.mr, rows_);
  const char* a = packed_queries_.data() + panel * plan_.panel_a;
  float* scores = scratch.strip;
  {
    const StageScope multiply(Stage::multiply);
    for (int64_t j = 0; j < columns; j += screen_.nr)
      screen_.tile(a, packed_documents_.data() + (start + j) / screen_.nr * plan_.panel_b, spec_.d, scores + j,
                   plan_.strip);
  }
  for (int64_t row = first_row; row < last_row; ++row, scores += plan_.strip) {
    const int64_t documents =
        block.offsets == nullptr ? columns : fold(scores, start, columns, first, block, state_[row].open);
    for_each_excluded(row, block.first_id + first, documents,
                      [&](int64_t column) { scores[column] = std::numeric_limits<float>::quiet_NaN(); });
    BandList& list = lists_[row];
    if (list.size + documents + kSlack > plan_.waiting) make_room(row, block, scratch);
    kernels_.select->append(scores, documents, static_cast<int32_t>(first), &list);
  }
}

// screen, in one pass.
void BandSearch::run(int64_t panel, int64_t start, int64_t turn, const Block& block, Scratch& scratch) {
  const StageScope multiply(Stage::multiply);
  const int64_t columns = std::min(plan_.strip, block.rows - start), first_row = panel * screen_.mr;
  const int64_t last_row = std::min<int64_t>(first_row + screen_.mr, rows_);
  std::vector<ExcludedPair>& excluded = scratch.excluded;
  excluded.clear();
  for (int64_t row = first_row; row < last_row; ++row)
    for_each_excluded(row, block.first_id + start, columns, [&](int64_t column) {
      excluded.push_back({static_cast<int32_t>(column), static_cast<int32_t>(row - first_row)});
    });
  std::sort(excluded.begin(), excluded.end(),
            [](const ExcludedPair& a, const ExcludedPair& b) { return a.column < b.column; });
  excluded.push_back({std::numeric_limits<int32_t>::max(), 0});
  struct Context {
    BandSearch& search;
    int64_t first_row;
    const Block& block;
    Scratch& scratch;
  } context{*this, first_row, block, scratch};
  // the next strip, in turns: as much of it as a run fetches ahead
  const int64_t ahead = start + plan_.strip + turn * plan_.strip / kTurns;
  screen_.run({
      .a = packed_queries_.data() + panel * plan_.panel_a,
      .b = packed_documents_.data() + start / screen_.nr * plan_.panel_b,
      .d = spec_.d,
      .columns = columns,
      .first = static_cast<int32_t>(start),
      .lists = lists_.data() + first_row,
      .room = plan_.waiting,
      .excluded = excluded.data(),
      .full =
          [](void* to, int32_t row) {
            const Context& c = *static_cast<Context*>(to);
            c.search.make_room(c.first_row + row, c.block, c.scratch);
          },
      .context = &context,
      .ahead = packed_documents_.data() + std::min(ahead, block.rows) / screen_.nr * plan_.panel_b,
      .scores = scratch.strip,
  });
}

// So few that the packed documents, which each task reads from L3, come once for many queries; their packed rows still
// leave L2 room for two strips.
int64_t BandSearch::tasks_of_runs() const {
  const int64_t threads = std::max(spec_.threads, 1), bytes = ceil_div(rows_, screen_.mr) * plan_.panel_a;
  return round_up(std::max(ceil_div(bytes, kTask), threads > 1 ? 4 * threads : 1), threads);
}

Status BandSearch::push(const void* docs, Dtype dtype, int64_t row_stride, int64_t count, int64_t first_id, Poll poll,
                        const int64_t* offsets) {
  using Clock = std::chrono::steady_clock;
  const int64_t row_bytes = row_stride * bytes_of(dtype), panels = ceil_div(rows_, screen_.mr);
  if (spec_.largest == 1) offsets = nullptr;  // each document is its row
  // a task: a range of panels of queries against the whole block, strip by strip
  const int64_t group = ceil_div(panels, plan_.runs ? tasks_of_runs() : 32 * std::max(spec_.threads, 1));
  std::atomic<bool> stopped{false};
  Clock::time_point asked = Clock::now();
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t first = begin, last = end = std::min(begin + plan_.block, count);  // rows
    if (offsets != nullptr) {
      end = std::upper_bound(offsets + begin, offsets + count + 1, offsets[begin] + plan_.block) - offsets - 1;
      first = offsets[begin] - offsets[0], last = offsets[end] - offsets[0];
    }
    const Rows source{static_cast<const char*>(docs) + first * row_bytes, dtype, row_bytes};
    Block block{source, last - first, end - begin, first_id + begin, offsets == nullptr ? nullptr : offsets + begin,
                {}};
    if (Status status = pack_documents(block); !status) return status;
    const StageScope select(Stage::select);
    parallel_for(ceil_div(panels, group), spec_.threads, [&](int64_t task, int thread) {
      Scratch& scratch = scratch_[thread];
      const int64_t first_panel = task * group, last_panel = std::min(panels, first_panel + group);
      for (int64_t row = first_panel * screen_.mr; row < std::min(rows_, last_panel * screen_.mr); ++row)
        set_thresholds(row, block.largest);
      for (int64_t start = 0; start < block.rows && !stopped.load(std::memory_order_relaxed); start += plan_.strip) {
        if (thread == 0 && poll.go_on != nullptr && Clock::now() - asked > std::chrono::milliseconds(50)) {
          if (!poll.go_on(poll.context)) stopped = true;
          asked = Clock::now();
        }
        const TileScope scope(screen_);  // not around go_on: a signal's handler may use tiles of its own
        for (int64_t panel = first_panel; panel < last_panel; ++panel)
          plan_.runs ? run(panel, start, panel - first_panel, block, scratch) : screen(panel, start, block, scratch);
      }
      settle(first_panel * screen_.mr, std::min(rows_, last_panel * screen_.mr), block, scratch);
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
    in_band[row] = std::max<int64_t>(0, lists_[row].counted - skipped);
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
    part.in_band[row] = lists_[row].counted;
  });
}

}  // namespace refine_fast
