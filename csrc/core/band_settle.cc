// The second half of BandSearch: what becomes of the documents in a query's list. They may wait until the end of their
// block; a list that fills up before is looked through at once. Most leave it then without a float64 score, because
// better ones have arrived since.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/band_scores.h"
#include "core/band_topk.h"
#include "core/numeric.h"
#include "core/stages.h"

namespace refine_fast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr size_t kAhead = 4;  // prefetch distance while rescoring

// Adds a hit to a heap of the `limit` first hits, whose top is the last of them.
template <class Before>
void offer(Hit* heap, int32_t& size, int64_t limit, Hit hit, Before before) {
  if (size == limit) {
    if (size == 0 || !before(hit, heap[0])) return;
    std::pop_heap(heap, heap + size, before);
    heap[size - 1] = hit;
  } else {
    heap[size++] = hit;
  }
  std::push_heap(heap, heap + size, before);
}

}  // namespace

void BandSearch::set_thresholds(int64_t row, const Bound& largest) {
  const Query& query = state_[row];
  BandThresholds& t = lists_[row].thresholds;
  const double lo = spec_.lo, hi = hi_[row], e = query.margin(largest);
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

uint64_t BandSearch::hash(const Query& query, int64_t id) { return hash_document(query.hash, id); }

// Whether a document in the band would be drawn, of those that are known.
bool BandSearch::is_lucky(int64_t row, int64_t id) const {
  if (!spec_.random) return false;
  const Query& query = state_[row];
  return query.drawn < plan_.drawn || (query.drawn > 0 && hash(query, id) < hash(query, drawn_[row * plan_.drawn].id));
}

// Looks through a query's list: counts and drops what its screened scores settle. The rest stays, in its order.
void BandSearch::look_through(int64_t row, const Block& block, Scratch& scratch) {
  Query& query = state_[row];
  BandList& list = lists_[row];
  const double lo = spec_.lo, hi = hi_[row];
  const auto filter = [&](const auto& stays) {
    int64_t size = 0;
    for (int64_t i = 0; i < list.size; ++i)
      if (stays(list.index[i], list.score[i])) list.index[size] = list.index[i], list.score[size++] = list.score[i];
    list.size = size;
  };
  std::vector<float>& least = scratch.least;
  least.clear();
  filter([&](int32_t column, float s) {
    const double e = query.margin(bounds_[column]);
    if (s >= lo + e && s <= hi - e) return least.push_back(below(s - e)), true;
    query.above += s > hi + e;
    return s >= lo - e && s <= hi + e;
  });
  raise_worst(row, scratch);
  filter([&](int32_t column, float s) {
    const double e = query.margin(bounds_[column]);
    const bool stays = s + e >= query.worst || s < lo + e || s > hi - e || is_lucky(row, block.first_id + column);
    list.counted += !stays;
    return stays;
  });
}

// Raises `worst` to a lower bound of the score of the last that would be kept now: by bisection over those of the hits
// and of the documents in `least`, since a heap of them would cost more.
void BandSearch::raise_worst(int64_t row, Scratch& scratch) {
  Query& query = state_[row];
  std::vector<float>& least = scratch.least;
  // a few would not raise it by much
  if (plan_.kept == 0 || least.size() < static_cast<size_t>(plan_.kept / 4) ||
      static_cast<int64_t>(least.size()) + query.kept < plan_.kept)
    return;
  const Hit* hits = hits_.data() + row * plan_.kept;
  for (int32_t i = 0; i < query.kept; ++i) least.push_back(below(hits[i].score));
  const auto [smallest, largest] = std::minmax_element(least.begin(), least.end());
  float low = *smallest, high = *largest;
  for (int step = 0; step < 12; ++step) {
    const float middle = low + (high - low) / 2;
    int32_t count = 0;
    for (const float s : least) count += s >= middle;
    (count >= plan_.kept ? low : high) = middle;
  }
  query.worst = std::max(query.worst, static_cast<double>(low));
}

void BandSearch::make_room(int64_t row, const Block& block, Scratch& scratch) {
  look_through(row, block, scratch);
  // a quarter of the room is to be gained, or looking through the list would come too often
  if (lists_[row].size > plan_.may_wait * 3 / 4) {
    scratch.waiting.clear();
    collect(row, scratch);
    rescore(block, scratch);
  }
  set_thresholds(row, block.largest);
}

// Settles all documents that wait, for a panel of queries at a time, so that rows are fetched while others are scored.
void BandSearch::settle(int64_t panel, const Block& block, Scratch& scratch) {
  scratch.waiting.clear();
  for (int64_t row = panel * screen_.mr; row < std::min<int64_t>(rows_, (panel + 1) * screen_.mr); ++row) {
    look_through(row, block, scratch);
    collect(row, scratch);
  }
  rescore(block, scratch);
}

// Moves a query's list to those that are rescored next.
void BandSearch::collect(int64_t row, Scratch& scratch) {
  BandList& list = lists_[row];
  for (int64_t i = 0; i < list.size; ++i) scratch.waiting.push_back({row, list.index[i], list.score[i]});
  list.size = 0;
}

void BandSearch::rescore(const Block& block, Scratch& scratch) {
  const StageScope stage(Stage::rescore);
  const std::vector<Waiting>& waiting = scratch.waiting;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (i + kAhead < waiting.size()) prefetch(waiting[i + kAhead].column, block);
    rescore(waiting[i], block, scratch);
  }
}

void BandSearch::prefetch(int64_t column, const Block& block) const {
  for (int64_t r = block.row_of(column); r < block.row_of(column + 1); ++r) {
    const char* row = block.docs.data + r * block.docs.row_bytes;
    for (int64_t byte = 0; byte < spec_.d * bytes_of(block.docs.dtype); byte += 64) __builtin_prefetch(row + byte);
  }
}

double BandSearch::exact(int64_t row, int64_t column, const Block& block, float* converted) const {
  double best = -kInfinity;
  for (int64_t r = block.row_of(column); r < block.row_of(column + 1); ++r) {
    const char* source = block.docs.data + r * block.docs.row_bytes;
    const float* document = reinterpret_cast<const float*>(source);
    if (block.docs.dtype != Dtype::f32) {
      kernels_.to_f32(source, block.docs.dtype, spec_.d, converted);
      document = converted;
    }
    const double s = kernels_.select->dot(queries_.data() + row * spec_.d, document, spec_.d);
    best = std::max(best, spec_.normalize ? s / (state_[row].norm * norms_[r]) : s);
  }
  return best;
}

// Settles a document by its float64 score, unless the bounds of its screened score do by now.
void BandSearch::rescore(const Waiting& document, const Block& block, Scratch& scratch) {
  const int64_t row = document.row;
  Query& query = state_[row];
  const double lo = spec_.lo, hi = hi_[row], s = document.score, e = query.margin(bounds_[document.column]);
  const bool inside = s >= lo + e && s <= hi - e;
  Hit hit{0, block.first_id + document.column};
  if (inside) {
    ++lists_[row].counted;
    if (s + e < query.worst && !is_lucky(row, hit.id)) return;
  }
  hit.score = exact(row, document.column, block, scratch.rows.data());
  if (!inside) {
    if (hit.score > hi) ++query.above;
    if (hit.score > hi || hit.score < lo) return;
    ++lists_[row].counted;
  }
  Hit* const hits = hits_.data() + row * plan_.kept;
  offer(hits, query.kept, plan_.kept, hit, better);
  offer(drawn_.data() + row * plan_.drawn, query.drawn, plan_.drawn, hit,
        [&](const Hit& a, const Hit& b) { return hash(query, a.id) < hash(query, b.id); });
  if (plan_.kept > 0 && query.kept == plan_.kept) query.worst = std::max(query.worst, hits[0].score);
}

}  // namespace refine_fast
