// Exact band search on tensor cores. The maths and the margin are those of csrc/core/band_topk.h, and every score is
// the same to the last bit.
//
//   pack     (band_pack.cu) rows as float16
//   screen   (band_screen.cu) their matrix product: the epilogue appends to a query's candidates the documents that may
//            be chosen, and counts those that are certainly in the band and certainly not chosen
//   settle   (band_settle.cu) float64 scores of the candidates, counts, the k + skip best, and the next thresholds
//
// The screen gives s~ with |s - s~| <= e. For the rounded operands x', y' and Y, R the largest norm and |y - y'| of a
// panel of documents,
//     e = |x - x'| Y  +  (|x| + |x - x'|) R  +  (d + 16) 2^-22 (|x| + |x - x'|) (Y + R):
// Cauchy-Schwarz on the rounding of each operand, and a float32 sum in which every addend may be truncated at the last
// bit of the largest, the coarsest rounding known of a tensor core. At d = 768 and unit norm: 5e-4 for float32 rows,
// 2e-4 for float16 rows, which pack exactly. Thresholds are rounded outwards.
//
// Bounded candidates. A query has room for `capacity` >= 512 candidates. A range of documents with more of them is
// undone for that query (its counts are dropped; nothing has been settled) and searched again in two halves; a range of
// at most `capacity` documents cannot overflow. Ranges start at `capacity` documents and double while few queries
// overflow: about k of the next n documents are better than the k-th best of the first n. The order in which atomics
// append does not matter: the first of a total order are kept, so equal inputs give equal bits.
#include "cuda/band_topk.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/numeric.h"
#include "cuda/band_pack.h"
#include "cuda/band_screen.h"
#include "cuda/band_settle.h"
#include "cuda/launch.h"

namespace refine_fast {
namespace {

constexpr int kMinCapacity = 512;

// The workspace, array by array.
struct Workspace {
  Lists lists;
  int64_t capacity;
  __half *queries, *docs;
  double *query_norms, *doc_norms;
  Edge* edges;
  Panel *query_panels, *doc_panels;
  Query* states;
  int32_t *found, *counted, *candidates;
  int32_t* overflowed;  // (levels, rows): one list for each level of halving
  struct Report {
    unsigned long long bad_row;
    int32_t overflowed;
  }* report;
  int64_t bytes = 0;

  explicit Workspace(const CudaBand& band) {
    const int64_t kept = band.random ? band.skip : band.k + band.skip,
                  drawn_room = band.random ? band.k + band.skip : 0;
    lists.kept = static_cast<int32_t>(kept), lists.drawn_room = static_cast<int32_t>(drawn_room);
    capacity = round_up(std::max<int64_t>(kMinCapacity, 2 * std::max(kept, drawn_room)), kPanel);
    const int64_t width = round_up(band.d, kTileK), rows = round_up(band.rows, kPanel),
                  docs_room = round_up(band.block, kPanel);
    int64_t levels = 1;
    for (int64_t range = docs_room; range > capacity; range = round_up(range / 2, kPanel)) ++levels;
    char* next = static_cast<char*>(band.workspace);
    const auto take = [&](auto*& place, int64_t count) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(next + bytes);
      bytes += round_up(count * static_cast<int64_t>(sizeof(*place)), 256);
    };
    take(lists.hits, band.rows * kept), take(lists.drawn, band.rows * drawn_room);
    take(queries, rows * width), take(docs, docs_room * width);
    take(query_norms, rows), take(doc_norms, docs_room);
    take(edges, rows), take(query_panels, rows / kPanel), take(doc_panels, docs_room / kPanel);
    take(states, rows), take(found, rows), take(counted, rows);
    take(candidates, band.rows * capacity), take(overflowed, band.rows * levels), take(report, 1);
  }
};

Rule rule_of(const CudaBand& band) {
  return {band.lo, band.d, band.skip, band.random != 0, band.band_first != 0, band.normalize != 0};
}

cudaError_t read_report(const Workspace& work, void* stream, Workspace::Report* report) {
  REFINE_FAST_TRY(
      cudaMemcpyAsync(report, work.report, sizeof(*report), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}

// Searches documents begin .. end of the block for some of the queries; those that get too many candidates search it
// again in halves. overflowed: how many those were at the first attempt.
cudaError_t search(const CudaBand& band, const Workspace& work, const Rows& docs, int64_t first_id, int64_t begin,
                   int64_t end, const int32_t* active, int64_t active_count, int level, unsigned long long* bad_row,
                   int32_t* overflowed) {
  int32_t* const list = work.overflowed + level * band.rows;
  const Rule rule = rule_of(band);
  const Exclude exclude = {band.offsets, band.ids};
  const auto low = static_cast<float>(band.lo);
  Screen screen = {};
  screen.queries = work.queries, screen.docs = work.docs, screen.width = static_cast<int32_t>(round_up(band.d, kTileK));
  screen.active = active, screen.active_count = static_cast<int32_t>(active_count);
  screen.begin = static_cast<int32_t>(begin), screen.end = static_cast<int32_t>(end), screen.first_id = first_id;
  screen.edges = work.edges, screen.panels = work.doc_panels, screen.states = work.states, screen.exclude = exclude;
  screen.random = rule.random, screen.low = low < band.lo ? std::nextafter(low, HUGE_VALF) : low;
  screen.sum = std::nextafter(static_cast<float>((static_cast<double>(band.d) + 16) * 0x1p-22), HUGE_VALF);
  screen.found = work.found, screen.counted = work.counted, screen.candidates = work.candidates;
  screen.capacity = static_cast<int32_t>(work.capacity);
  REFINE_FAST_TRY(launch_screen(screen, band.stream));

  Settle settle = {};
  settle.rule = rule, settle.lists = work.lists, settle.exclude = exclude;
  settle.queries = {band.queries, band.queries_stride, band.queries_dtype}, settle.docs = docs,
  settle.doc_norms = work.doc_norms;
  settle.first_id = first_id, settle.end = static_cast<int32_t>(end), settle.active = active,
  settle.states = work.states;
  settle.found = work.found, settle.counted = work.counted, settle.candidates = work.candidates,
  settle.capacity = screen.capacity;
  settle.overflowed = list, settle.overflowed_count = &work.report->overflowed;
  REFINE_FAST_TRY(cudaMemsetAsync(settle.overflowed_count, 0, sizeof(int32_t), static_cast<cudaStream_t>(band.stream)));
  REFINE_FAST_TRY(launch_settle(settle, active_count, band.stream));

  Workspace::Report report;
  REFINE_FAST_TRY(read_report(work, band.stream, &report));
  *overflowed = report.overflowed, *bad_row = report.bad_row;
  if (report.overflowed == 0 || report.bad_row != kNoBadRow) return cudaSuccess;
  const int64_t middle = begin + round_up((end - begin) / 2, kPanel);
  int32_t again = 0;
  REFINE_FAST_TRY(
      search(band, work, docs, first_id, begin, middle, list, report.overflowed, level + 1, bad_row, &again));
  return search(band, work, docs, first_id, middle, end, list, report.overflowed, level + 1, bad_row, &again);
}

}  // namespace
}  // namespace refine_fast

using namespace refine_fast;

extern "C" int64_t refine_fast_cuda_band_bytes(const CudaBand* band) { return Workspace(*band).bytes; }

extern "C" int refine_fast_cuda_band_set_queries(CudaBand* band, const void* queries, Dtype dtype, int64_t row_stride,
                                                 uint64_t* bad_row) {
  const Workspace work(*band);
  band->queries = queries, band->queries_dtype = dtype, band->queries_stride = row_stride;
  band->piece = work.capacity;
  Pack pack = {};
  pack.rows = {queries, row_stride, dtype}, pack.count = band->rows, pack.d = band->d, pack.first_id = band->first;
  pack.width = static_cast<int32_t>(round_up(band->d, kTileK)), pack.normalize = band->normalize != 0;
  pack.packed = work.queries, pack.norms = work.query_norms, pack.edges = work.edges, pack.panels = work.query_panels;
  pack.bad_row = &work.report->bad_row;
  REFINE_FAST_TRY(cudaMemsetAsync(work.report, 0xff, sizeof(*work.report), static_cast<cudaStream_t>(band->stream)));
  REFINE_FAST_TRY(launch_pack(pack, band->stream));
  Begin begin = {};
  begin.rule = rule_of(*band), begin.lists = work.lists, begin.exclude = {band->offsets, band->ids};
  begin.seed = band->seed, begin.first = band->first, begin.rows = band->rows, begin.hi = band->hi;
  begin.norms = work.query_norms, begin.edges = work.edges, begin.queries = work.states;
  begin.found = work.found, begin.counted = work.counted;
  REFINE_FAST_TRY(launch_begin(begin, band->stream));
  Workspace::Report report;
  REFINE_FAST_TRY(read_report(work, band->stream, &report));
  *bad_row = report.bad_row;
  return cudaSuccess;
}

extern "C" int refine_fast_cuda_band_push(CudaBand* band, const void* docs, Dtype dtype, int64_t row_stride,
                                          int64_t rows, int64_t first_id, uint64_t* bad_row) {
  const Workspace work(*band);
  const Rows source = {docs, row_stride, dtype};
  Pack pack = {};
  pack.rows = source, pack.count = rows, pack.d = band->d, pack.first_id = first_id;
  pack.width = static_cast<int32_t>(round_up(band->d, kTileK)), pack.normalize = band->normalize != 0;
  pack.packed = work.docs, pack.norms = work.doc_norms, pack.panels = work.doc_panels,
  pack.bad_row = &work.report->bad_row;
  REFINE_FAST_TRY(launch_pack(pack, band->stream));
  unsigned long long bad = kNoBadRow;
  for (int64_t begin = 0; begin < rows && bad == kNoBadRow;) {
    const int64_t end = std::min(rows, begin + band->piece);
    int32_t overflowed = 0;
    REFINE_FAST_TRY(search(*band, work, source, first_id, begin, end, nullptr, band->rows, 0, &bad, &overflowed));
    begin = end;
    if (overflowed > band->rows / 16)
      band->piece = std::max(work.capacity, round_up(band->piece / 2, kPanel));
    else
      band->piece = std::min(2 * band->piece, round_up(band->block, kPanel));
  }
  *bad_row = bad;
  return cudaSuccess;
}

extern "C" int refine_fast_cuda_band_finish(const CudaBand* band, int64_t* ids, float* scores, int64_t* in_band) {
  const Workspace work(*band);
  const Finish finish = {rule_of(*band), work.lists, band->k, work.states, ids, scores, in_band};
  return launch_finish(finish, band->rows, band->stream);
}

extern "C" int refine_fast_cuda_band_finish_part(const CudaBand* band, const CudaBandPart* part) {
  const Workspace work(*band);
  const FinishPart finish = {rule_of(*band),  work.lists,         work.states, part->ids,    part->scores,
                             part->drawn_ids, part->drawn_scores, part->above, part->in_band};
  return launch_finish_part(finish, band->rows, band->stream);
}
