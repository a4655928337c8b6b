// The second half of BandSearch: what becomes of the documents in a query's list. They may wait until the end of their
// block; a list that fills up before is looked through at once. Most leave it then without a float64 score, because
// better ones have arrived since. The others get theirs document by document, for many queries at a time.
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
  if (size < limit) {
    heap[size++] = hit;
    std::push_heap(heap, heap + size, before);
    return;
  }
  if (size == 0 || !before(hit, heap[0])) return;
  // in place of the top, which std::pop_heap and push_heap would do in twice as many steps
  int64_t at = 0;
  for (int64_t below; (below = 2 * at + 1) < size; at = below) {
    below += below + 1 < size && before(heap[below], heap[below + 1]);
    if (!before(hit, heap[below])) break;
    heap[at] = heap[below];
  }
  heap[at] = hit;
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
  if (lists_[row].size > plan_.may_wait * 3 / 4) rescore(row, row + 1, block, scratch);
  set_thresholds(row, block.largest);
}

// Settles all documents of a block that wait for queries first_row .. last_row.
void BandSearch::settle(int64_t first_row, int64_t last_row, const Block& block, Scratch& scratch) {
  for (int64_t begin = first_row, row = first_row, waiting = 0; begin < last_row;) {
    look_through(row, block, scratch);
    waiting += lists_[row++].size;
    if (row < last_row && waiting < kBatch) continue;
    rescore(begin, row, block, scratch);
    begin = row, waiting = 0;
  }
}

// Takes the float64 scores of all documents that wait, document by document: their rows pass by in ascending order,
// each once for all the queries, whose rows stay in L2. The scores come back in the order of the lists.
void BandSearch::rescore(int64_t first_row, int64_t last_row, const Block& block, Scratch& scratch) {
  const StageScope stage(Stage::rescore);
  std::vector<int32_t>& next = scratch.next;
  next.assign(static_cast<size_t>(block.documents) + 1, 0);
  for (int64_t row = first_row; row < last_row; ++row)
    for (int64_t i = 0; i < lists_[row].size; ++i) ++next[lists_[row].index[i] + 1];
  for (int64_t column = 0; column < block.documents; ++column) next[column + 1] += next[column];
  const auto count = static_cast<size_t>(next[block.documents]);
  std::vector<Waiting>& waiting = scratch.waiting;
  waiting.resize(count), scratch.scores.resize(count);
  int32_t place = 0;
  for (int64_t row = first_row; row < last_row; ++row)
    for (int64_t i = 0; i < lists_[row].size; ++i, ++place) {
      const int32_t column = lists_[row].index[i];
      waiting[next[column]++] = {column, static_cast<int32_t>(row), place};
    }
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch(waiting[i + kAhead].column, block);
    scratch.scores[waiting[i].place] = exact(waiting[i].row, waiting[i].column, block, scratch.rows.data());
  }
  const double* score = scratch.scores.data();
  for (int64_t row = first_row; row < last_row; ++row) {
    BandList& list = lists_[row];
    if (row + 1 < last_row) prefetch_hits(row + 1);
    for (int64_t i = 0; i < list.size; ++i) take(row, {*score++, block.first_id + list.index[i]});
    list.size = 0;
  }
}

void BandSearch::prefetch_hits(int64_t row) const {
  const Hit* hits = hits_.data() + row * plan_.kept;
  for (int32_t i = 0; i < state_[row].kept; i += 64 / sizeof(Hit)) __builtin_prefetch(hits + i, 1);
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

// Counts a document by its float64 score, and keeps it if it is among the best.
void BandSearch::take(int64_t row, const Hit& hit) {
  Query& query = state_[row];
  if (hit.score > hi_[row]) ++query.above;
  if (hit.score > hi_[row] || hit.score < spec_.lo) return;
  ++lists_[row].counted;
  Hit* const hits = hits_.data() + row * plan_.kept;
  offer(hits, query.kept, plan_.kept, hit, [](const Hit& a, const Hit& b) { return better(a, b); });
  offer(drawn_.data() + row * plan_.drawn, query.drawn, plan_.drawn, hit,
        [&](const Hit& a, const Hit& b) { return hash(query, a.id) < hash(query, b.id); });
  if (plan_.kept > 0 && query.kept == plan_.kept) query.worst = std::max(query.worst, hits[0].score);
}

}  // namespace refine_fast
