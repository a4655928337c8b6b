// One block of threads for each query: float64 scores of its candidates, counts, the k + skip best, and the next
// thresholds.
//
// Roofline: memory. A candidate's document is d elements from anywhere in the block of documents, read by one warp for
// 2 d operations. The accumulator: a float64 sum in the fixed order of SelectKernels::dot, so that scores agree with
// the CPU's to the last bit.
#include "cuda/band_settle.h"

#include <cmath>

#include "cuda/launch.h"

namespace refine_fast {
namespace {

constexpr double kInfinity = HUGE_VAL;

__device__ void pass_excluded(Query& query, const Exclude& exclude, int64_t row, int64_t id) {
  if (exclude.offsets == nullptr) return;
  const int64_t end = exclude.offsets[row + 1];
  query.excluded_at = lower_bound(exclude.ids, query.excluded_at, end, id);
  query.excluded = query.excluded_at < end ? exclude.ids[query.excluded_at] : INT64_MAX;
}

__device__ void set_thresholds(Query& query, const Rule& rule, const Lists& lists, int64_t row) {
  const bool full = query.kept == lists.kept;
  const double worst = !full             ? -kInfinity
                       : lists.kept == 0 ? kInfinity
                                         : lists.hits[row * lists.kept + lists.kept - 1].score;
  query.best = __double2float_rd(fmin(worst, query.hi));
  query.top = rule.band_first || query.above >= rule.skip ? __double2float_ru(query.hi) : static_cast<float>(kInfinity);
  query.last_hash = query.drawn < lists.drawn_room ? ~uint64_t{0}
                    : lists.drawn_room == 0
                        ? 0
                        : hash(query, lists.drawn[row * lists.drawn_room + lists.drawn_room - 1].id);
}

__global__ void begin_kernel(Begin p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  Query query = {};
  query.hi = p.hi[row], query.norm = p.norms[row];
  query.hash = hash_query(p.seed, p.first + row);
  query.excluded_at = p.exclude.offsets == nullptr ? 0 : p.exclude.offsets[row];
  query.excluded = INT64_MAX;
  pass_excluded(query, p.exclude, row, 0);
  set_thresholds(query, p.rule, p.lists, row);
  p.edges[row].low = p.rule.lo <= query.hi ? __double2float_rd(p.rule.lo) : static_cast<float>(kInfinity);
  p.queries[row] = query;
  p.found[row] = p.counted[row] = 0;
}

__global__ void __launch_bounds__(kSettleThreads) settle_kernel(Settle p) {
  __shared__ Hit fresh[kBatch];
  __shared__ int fresh_count, above;
  const int row = p.active == nullptr ? static_cast<int>(blockIdx.x) : p.active[blockIdx.x];
  const int found = p.found[row];
  Query query = p.states[row];
  __syncthreads();
  if (found > p.capacity) {
    if (threadIdx.x == 0) {
      p.overflowed[atomicAdd(p.overflowed_count, 1)] = row;
      p.found[row] = p.counted[row] = 0;
    }
    return;
  }
  const SmallerHash smaller_hash = {query};
  for (int first = 0; first < found; first += kBatch) {
    if (threadIdx.x == 0) fresh_count = above = 0;
    __syncthreads();
    for (int i = first + warp_id(); i < min(found, first + kBatch); i += kSettleThreads / 32) {
      const int doc = p.candidates[static_cast<int64_t>(row) * p.capacity + i];
      double sum = 0;
      for (int64_t j = lane_id(); j < p.rule.d; j += 32)
        sum = fma(static_cast<double>(p.queries.at(row, j)), static_cast<double>(p.docs.at(doc, j)), sum);
      sum = fold(sum);
      const double score = p.rule.normalize ? sum / (query.norm * p.doc_norms[doc]) : sum;
      if (lane_id() == 0) {
        if (score > query.hi)
          atomicAdd(&above, 1);
        else if (score >= p.rule.lo)
          fresh[atomicAdd(&fresh_count, 1)] = {score, p.first_id + doc};
      }
    }
    __syncthreads();
    query.above += above, query.inside += fresh_count;
    const int count = fresh_count;
    sort(fresh, count, MoreSimilar{});
    query.kept = merge(p.lists.hits + static_cast<int64_t>(row) * p.lists.kept, query.kept, p.lists.kept, fresh, count,
                       MoreSimilar{});
    if (p.rule.random) {
      sort(fresh, count, smaller_hash);
      query.drawn = merge(p.lists.drawn + static_cast<int64_t>(row) * p.lists.drawn_room, query.drawn,
                          p.lists.drawn_room, fresh, count, smaller_hash);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    query.inside += p.counted[row];
    p.found[row] = p.counted[row] = 0;
    pass_excluded(query, p.exclude, row, p.first_id + p.end);
    set_thresholds(query, p.rule, p.lists, row);
    p.states[row] = query;
  }
}

__global__ void __launch_bounds__(kSettleThreads) finish_kernel(Finish p) {
  const int64_t row = blockIdx.x;
  const Query query = p.states[row];
  const Hit* const hits = p.lists.hits + row * p.lists.kept;
  Hit* const drawn = p.lists.drawn + row * p.lists.drawn_room;
  const int64_t skipped = p.rule.band_first ? p.rule.skip : p.rule.skip - min(query.above, p.rule.skip);
  const int dropped = static_cast<int>(min(skipped, static_cast<int64_t>(query.kept)));
  if (threadIdx.x == 0) p.in_band[row] = max(int64_t{0}, query.inside - skipped);
  const Hit* chosen = hits + dropped;
  int64_t found = min(p.k, static_cast<int64_t>(query.kept - dropped));
  if (p.rule.random) {
    // The dropped hits leave `drawn`: each of the others moves forward by the number of dropped ones before it, the
    // first of them first.
    const SmallerHash smaller_hash = {query};
    int gone_in_all = 0;
    for (int j = 0; j < dropped; ++j)
      gone_in_all += query.drawn < p.lists.drawn_room || hash(query, hits[j].id) <= query.last_hash;
    for (int start = 0; start < query.drawn; start += kSettleThreads) {
      const int from = start + static_cast<int>(threadIdx.x);
      Hit hit = {};
      int to = -1;
      if (from < query.drawn) {
        hit = drawn[from];
        bool gone = false;
        int before = 0;
        for (int j = 0; j < dropped; ++j) gone |= hits[j].id == hit.id, before += smaller_hash(hits[j], hit);
        if (!gone) to = from - before;
      }
      __syncthreads();
      if (to >= 0) drawn[to] = hit;
    }
    __syncthreads();
    found = min(p.k, static_cast<int64_t>(query.drawn - gone_in_all));
    sort(drawn, static_cast<int>(found), MoreSimilar{});
    chosen = drawn;
  }
  for (int64_t i = threadIdx.x; i < p.k; i += blockDim.x) {
    p.ids[row * p.k + i] = i < found ? chosen[i].id : -1;
    p.scores[row * p.k + i] = i < found ? static_cast<float>(chosen[i].score) : __int_as_float(0x7fc00000);
  }
}

__device__ void write(const Hit* hits, int count, int room, int64_t* ids, double* scores) {
  for (int i = static_cast<int>(threadIdx.x); i < room; i += kSettleThreads) {
    ids[i] = i < count ? hits[i].id : -1;
    scores[i] = i < count ? hits[i].score : static_cast<double>(__int_as_float(0x7fc00000));
  }
}

__global__ void __launch_bounds__(kSettleThreads) finish_part_kernel(FinishPart p) {
  const int64_t row = blockIdx.x, kept = p.lists.kept, drawn = p.lists.drawn_room;
  const Query query = p.states[row];
  write(p.lists.hits + row * kept, query.kept, p.lists.kept, p.ids + row * kept, p.scores + row * kept);
  write(p.lists.drawn + row * drawn, query.drawn, p.lists.drawn_room, p.drawn_ids + row * drawn,
        p.drawn_scores + row * drawn);
  if (threadIdx.x == 0) {
    p.above[row] = p.rule.band_first ? 0 : min(query.above, p.rule.skip);
    p.in_band[row] = query.inside;
  }
}

}  // namespace

cudaError_t launch_begin(const Begin& begin, void* stream) {
  return launch(begin_kernel, ceil_div(begin.rows, 256), 256, 0, stream, begin);
}

cudaError_t launch_settle(const Settle& settle, int64_t active_count, void* stream) {
  return launch(settle_kernel, active_count, kSettleThreads, 0, stream, settle);
}

cudaError_t launch_finish(const Finish& finish, int64_t rows, void* stream) {
  return launch(finish_kernel, rows, kSettleThreads, 0, stream, finish);
}

cudaError_t launch_finish_part(const FinishPart& part, int64_t rows, void* stream) {
  return launch(finish_part_kernel, rows, kSettleThreads, 0, stream, part);
}

}  // namespace refine_fast
