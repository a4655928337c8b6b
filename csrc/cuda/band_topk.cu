// Exact band search on tensor cores; the maths and its margin are those of csrc/core/band_topk.h, and so is every score to the last bit.
//
//   pack     rows as float16, a panel of 256 sharing a power of two that brings its largest element to 2^14: none overflows, and what lies
//            28 binades below is flushed to zero here, so that nothing depends on what the hardware does to denormals
//   screen   (band_screen.cu) their matrix product, whose epilogue appends to a query's candidates what may be chosen, and counts what is
//            certainly in the band and certainly not chosen
//   settle   a block of threads per query: float64 scores of the candidates, counts, the k + skip best, and with them the next threshold
//
// The screen gives s~ with |s - s~| <= e. For the rounded operands x', y' and Y, R the largest norm and |y - y'| of a panel of documents,
//     e = |x - x'| Y  +  (|x| + |x - x'|) R  +  (d + 16) 2^-22 (|x| + |x - x'|) (Y + R):
// Cauchy-Schwarz on the rounding of each operand, and a float32 sum of which every addend may be truncated at the last bit of the largest, the
// coarsest that is known of a tensor core. At d = 768 and unit norm: 5e-4 for float32 rows, 2e-4 for float16 rows, which pack exactly.
// Thresholds are rounded outwards.
//
// Bounded candidates. A query has room for `capacity` >= 512 of them. A range of documents that brings more is undone for that query (its
// counts are dropped; nothing had been settled) and searched again in two halves; a range of at most `capacity` documents cannot overflow.
// Ranges start at `capacity` documents and double while few queries overflow: beyond the k-th best of n documents lie some k of the next n.
// The order in which atomics append does not matter: what is kept are the first of a total order, so equal inputs give equal bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/band_screen.h"
#include "cuda/band_topk.h"
#include "cuda/launch.h"

namespace refine_fast {
namespace {

constexpr int kPackThreads = 256, kSettleThreads = 128;
constexpr int kBatch = 512;  // candidates that are settled at a time
constexpr int kLeastCapacity = 512;
constexpr double kLargestNorm = 1e18, kSmallestNorm = 1e-12, kInfinity = HUGE_VAL;

struct Hit {
  double score;
  int64_t id;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Rows {
  const void* data;
  int64_t stride;
  Dtype dtype;
  template <class T>
  __device__ const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
  __device__ float at(int64_t i, int64_t j) const {
    return dtype == Dtype::f32 ? row<float>(i)[j] : dtype == Dtype::f16 ? to_float(row<__half>(i)[j]) : to_float(row<__nv_bfloat16>(i)[j]);
  }
};

// SelectKernels::dot's order: lane l sums the i = l (mod 32), then lanes are folded by 8, 16, 4, 2 and 1. Every lane gets the sum.
__device__ double fold(double sum) {
  for (int step : {8, 16, 4, 2, 1}) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// --- pack ----------------------------------------------------------------------------------------------------------------------------

struct Pack {
  Rows rows;
  int64_t count, d, first_id;
  int32_t width;  // of a packed row: d rounded up to kTileK; what is beyond a row, or beyond the last row of its panel, becomes zero
  bool normalize;
  __half* packed;
  double* norms;
  Edge* edges;  // residual, reach and scale of each row, or null
  Panel* panels;
  unsigned long long* bad_row;
};

__device__ void raise_to(float* most, float x) { atomicMax(reinterpret_cast<int*>(most), __float_as_int(x)); }  // x >= 0

// A lane's next kAhead elements j, j + 32, ... of a row of count, 0 beyond: loads in flight together.
constexpr int kAhead = 8;
template <class T>
__device__ void load_ahead(const T* row, int64_t j, int64_t count, float (&x)[kAhead]) {
#pragma unroll
  for (int u = 0; u < kAhead; ++u) x[u] = j + u * 32 < count ? to_float(row[j + u * 32]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(Pack p) {
  __shared__ float largest, size, residual;
  __shared__ double norms[kPanel], sizes[kPanel];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPanel;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kPanel), p.count - first));
  if (threadIdx.x == 0) largest = size = residual = 0;
  __syncthreads();
  for (int r = warp_id(); r < rows; r += kPackThreads / 32) {
    double sum = 0;
    float most = 0;
    for (int64_t j = lane_id(); j < p.d; j += kAhead * 32) {
      float x[kAhead];
      load_ahead(p.rows.row<T>(first + r), j, p.d, x);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) sum = fma(static_cast<double>(x[u]), static_cast<double>(x[u]), sum), most = fmaxf(most, fabsf(x[u]));
    }
    sum = fold(sum);
    const double norm = p.normalize ? fmax(sqrt(sum), kSmallestNorm) : 1.0, own = sqrt(sum) / norm * (1 + 0x1p-20);
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, step));
    if (lane_id() == 0) {
      raise_to(&largest, static_cast<float>(most / norm));
      const auto row = static_cast<unsigned long long>(p.first_id + first + r);
      if (!isfinite(sum)) atomicMin(p.bad_row, 2 * row);
      else if (own > kLargestNorm) atomicMin(p.bad_row, 2 * row + 1);
      norms[r] = p.norms[first + r] = norm;
      sizes[r] = own;
    }
  }
  __syncthreads();
  // 2^14 over the power of two in `largest`, within bounds: two scales together stay a normal float, and |x - x'| tells what a row loses
  const int exponent = min(max(14 + 127 - (__float_as_int(largest) >> 23), -60), 60);
  const float scale = ldexpf(1, exponent), unscale = ldexpf(1, -exponent);
  for (int r = warp_id(); r < kPanel; r += kPackThreads / 32) {
    __half* out = p.packed + (first + r) * p.width;
    const double inverse = r < rows ? 1 / norms[r] : 0;
    float lost = 0;
    for (int64_t j = lane_id(); j < p.width; j += kAhead * 32) {
      float x[kAhead];
      load_ahead(p.rows.row<T>(first + r), j, r < rows ? p.d : 0, x);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const float scaled = static_cast<float>(x[u] * inverse) * scale;
        const __half h = __float2half_rn(fabsf(scaled) < 0x1p-14f ? 0.0f : scaled);
        const float difference = scaled - __half2float(h);  // exact
        lost = fmaf(difference, difference, lost);
        if (j + u * 32 < p.width) out[j + u * 32] = h;
      }
    }
    for (int step = 16; step > 0; step /= 2) lost += __shfl_xor_sync(kWholeWarp, lost, step);
    if (lane_id() == 0 && r < rows) {
      // the float sums of `lost` err by less than 2^-10, and by 2^-126 where a square underflows; a normalized element errs by 2^-24 of itself
      const double squares = static_cast<double>(lost) + static_cast<double>(p.d) * 0x1p-126;
      const double own = sqrt(squares) * (1 + 0x1p-10) * unscale + (p.normalize ? 0x1p-23 * sizes[r] : 0.0);
      raise_to(&size, __double2float_ru(sizes[r]));
      raise_to(&residual, __double2float_ru(own));
      if (p.edges != nullptr) p.edges[first + r] = {0, __double2float_ru(own), __double2float_ru(sizes[r] + own), scale};
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.panels[blockIdx.x] = {scale, size, residual, 0};
}

// --- the state of a query --------------------------------------------------------------------------------------------------------------

struct Lists {
  Hit *hits, *drawn;  // (rows, kept): most similar first; (rows, drawn): smallest hash first
  int32_t kept, drawn_room;
};

__device__ void pass_excluded(Query& query, const Exclude& exclude, int64_t row, int64_t id) {
  if (exclude.offsets == nullptr) return;
  const int64_t end = exclude.offsets[row + 1];
  query.excluded_at = lower_bound(exclude.ids, query.excluded_at, end, id);
  query.excluded = query.excluded_at < end ? exclude.ids[query.excluded_at] : INT64_MAX;
}

struct Rule {
  double lo;
  int64_t d, skip;
  bool random, band_first, normalize;
};

__device__ void set_thresholds(Query& query, const Rule& rule, const Lists& lists, int64_t row) {
  const bool full = query.kept == lists.kept;
  const double worst = !full ? -kInfinity : lists.kept == 0 ? kInfinity : lists.hits[row * lists.kept + lists.kept - 1].score;
  query.best = __double2float_rd(fmin(worst, query.hi));
  query.top = rule.band_first || query.above >= rule.skip ? __double2float_ru(query.hi) : static_cast<float>(kInfinity);
  query.last_hash = query.drawn < lists.drawn_room ? ~uint64_t{0}
                    : lists.drawn_room == 0       ? 0
                                                  : hash(query, lists.drawn[row * lists.drawn_room + lists.drawn_room - 1].id);
}

struct Begin {
  Rule rule;
  Lists lists;
  Exclude exclude;
  uint64_t seed;
  int64_t first, rows;
  const double *hi, *norms;
  Edge* edges;
  Query* queries;
  int32_t *found, *counted;
};

__global__ void begin_kernel(Begin p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  Query query = {};
  query.hi = p.hi[row], query.norm = p.norms[row];
  query.hash = mix(mix(p.seed + kGolden) + static_cast<uint64_t>(p.first + row) * kGolden);
  query.excluded_at = p.exclude.offsets == nullptr ? 0 : p.exclude.offsets[row];
  query.excluded = INT64_MAX;
  pass_excluded(query, p.exclude, row, 0);
  set_thresholds(query, p.rule, p.lists, row);
  p.edges[row].low = p.rule.lo <= query.hi ? __double2float_rd(p.rule.lo) : static_cast<float>(kInfinity);
  p.queries[row] = query;
  p.found[row] = p.counted[row] = 0;
}

// --- settle ----------------------------------------------------------------------------------------------------------------------------

struct MoreSimilar {
  __device__ bool operator()(const Hit& a, const Hit& b) const { return a.score > b.score || (a.score == b.score && a.id < b.id); }
};
struct SmallerHash {
  const Query& query;
  __device__ bool operator()(const Hit& a, const Hit& b) const { return hash(query, a.id) < hash(query, b.id); }
};

// Sorts in place with all threads of the block: the bitonic network whose every comparison puts the first element first, so that the places
// beyond count, which would hold the last of all, need not exist.
template <class Before>
__device__ void sort(Hit* list, int count, Before before) {
  const auto exchange = [&](int low, int high) {
    if (high < count && before(list[high], list[low])) {
      const Hit hit = list[low];
      list[low] = list[high], list[high] = hit;
    }
  };
  int pairs = 1;
  while (2 * pairs < count) pairs *= 2;
  for (int half = 1; half < count; half *= 2) {
    for (int t = threadIdx.x; t < pairs; t += blockDim.x) {
      const int start = t / half * half * 2, i = t % half;
      exchange(start + i, start + 2 * half - 1 - i);
    }
    __syncthreads();
    for (int step = half / 2; step > 0; step /= 2) {
      for (int t = threadIdx.x; t < pairs; t += blockDim.x) exchange(t / step * step * 2 + t % step, t / step * step * 2 + t % step + step);
      __syncthreads();
    }
  }
}

// How many of list[0, count), which is sorted, come before hit.
template <class Before>
__device__ int rank(const Hit* list, int count, const Hit& hit, Before before) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (before(list[middle], hit)) low = middle + 1;
    else count = middle;
  }
  return low;
}

// Merges fresh, sorted, at most kBatch, into list, sorted, of `room` places; returns the new count. All threads of the block.
template <class Before>
__device__ int merge(Hit* list, int count, int room, const Hit* fresh, int fresh_count, Before before) {
  if (fresh_count == 0 || room == 0) return count;
  int place[kBatch / kSettleThreads];
#pragma unroll
  for (int i = 0; i < kBatch / kSettleThreads; ++i) {
    const int own = i * kSettleThreads + static_cast<int>(threadIdx.x);
    place[i] = own < fresh_count ? own + rank(list, count, fresh[own], before) : room;
  }
  // Hits move towards the end only, so the last of them move first.
  const int first = rank(list, count, fresh[0], before);
  for (int chunk = (count - first + kSettleThreads - 1) / kSettleThreads - 1; chunk >= 0; --chunk) {
    const int from = first + chunk * kSettleThreads + static_cast<int>(threadIdx.x);
    Hit hit = {};
    int to = room;
    if (from < count) hit = list[from], to = from + rank(fresh, fresh_count, hit, before);
    __syncthreads();
    if (to < room) list[to] = hit;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBatch / kSettleThreads; ++i)
    if (place[i] < room) list[place[i]] = fresh[i * kSettleThreads + static_cast<int>(threadIdx.x)];
  __syncthreads();
  return min(count + fresh_count, room);
}

struct Settle {
  Rule rule;
  Lists lists;
  Exclude exclude;
  Rows queries, docs;
  const double* doc_norms;
  int64_t first_id;
  int32_t end;  // documents of the block that lie behind
  const int32_t* active;
  Query* states;
  int32_t *found, *counted;
  const int32_t* candidates;
  int32_t capacity;
  int32_t *overflowed, *overflowed_count;  // the queries that had more
};

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
        if (score > query.hi) atomicAdd(&above, 1);
        else if (score >= p.rule.lo) fresh[atomicAdd(&fresh_count, 1)] = {score, p.first_id + doc};
      }
    }
    __syncthreads();
    query.above += above, query.inside += fresh_count;
    const int count = fresh_count;
    sort(fresh, count, MoreSimilar{});
    query.kept = merge(p.lists.hits + static_cast<int64_t>(row) * p.lists.kept, query.kept, p.lists.kept, fresh, count, MoreSimilar{});
    if (p.rule.random) {
      sort(fresh, count, smaller_hash);
      query.drawn = merge(p.lists.drawn + static_cast<int64_t>(row) * p.lists.drawn_room, query.drawn, p.lists.drawn_room, fresh, count,
                          smaller_hash);
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

// --- finish ----------------------------------------------------------------------------------------------------------------------------

struct Finish {
  Rule rule;
  Lists lists;
  int64_t k;
  const Query* states;
  int64_t* ids;
  float* scores;
  int64_t* in_band;
};

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
    // Those that are dropped leave `drawn`: each of the rest moves forward by the number of them before it, the first of them first.
    const SmallerHash smaller_hash = {query};
    int gone_in_all = 0;
    for (int j = 0; j < dropped; ++j) gone_in_all += query.drawn < p.lists.drawn_room || hash(query, hits[j].id) <= query.last_hash;
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

// --- host ------------------------------------------------------------------------------------------------------------------------------

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The workspace, piece by piece.
struct Workspace {
  Lists lists;
  int64_t capacity;
  __half *queries, *docs;
  double *query_norms, *doc_norms;
  Edge* edges;
  Panel *query_panels, *doc_panels;
  Query* states;
  int32_t *found, *counted, *candidates;
  int32_t* overflowed;  // (levels, rows): one list a level of halving
  struct Report {
    unsigned long long bad_row;
    int32_t overflowed;
  }* report;
  int64_t bytes = 0;

  explicit Workspace(const CudaBand& band) {
    const int64_t kept = band.random ? band.skip : band.k + band.skip, drawn_room = band.random ? band.k + band.skip : 0;
    lists.kept = static_cast<int32_t>(kept), lists.drawn_room = static_cast<int32_t>(drawn_room);
    capacity = round_up(std::max<int64_t>(kLeastCapacity, 2 * std::max(kept, drawn_room)), kPanel);
    const int64_t width = round_up(band.d, kTileK), rows = round_up(band.rows, kPanel), docs_room = round_up(band.block, kPanel);
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

cudaError_t launch_pack(const Pack& pack, void* stream) {
  const int64_t panels = (pack.count + kPanel - 1) / kPanel;
  if (pack.rows.dtype == Dtype::f32) return launch(pack_kernel<float>, panels, kPackThreads, 0, stream, pack);
  if (pack.rows.dtype == Dtype::f16) return launch(pack_kernel<__half>, panels, kPackThreads, 0, stream, pack);
  return launch(pack_kernel<__nv_bfloat16>, panels, kPackThreads, 0, stream, pack);
}

Rule rule_of(const CudaBand& band) {
  return {band.lo, band.d, band.skip, band.random != 0, band.band_first != 0, band.normalize != 0};
}

cudaError_t read_report(const Workspace& work, void* stream, Workspace::Report* report) {
  REFINE_FAST_TRY(cudaMemcpyAsync(report, work.report, sizeof(*report), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}

// Searches documents begin .. end of the block for some of the queries, in halves for those that it brings too many candidates.
// overflowed: how many those were at the first attempt.
cudaError_t search(const CudaBand& band, const Workspace& work, const Rows& docs, int64_t first_id, int64_t begin, int64_t end,
                   const int32_t* active, int64_t active_count, int level, unsigned long long* bad_row, int32_t* overflowed) {
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
  settle.queries = {band.queries, band.queries_stride, band.queries_dtype}, settle.docs = docs, settle.doc_norms = work.doc_norms;
  settle.first_id = first_id, settle.end = static_cast<int32_t>(end), settle.active = active, settle.states = work.states;
  settle.found = work.found, settle.counted = work.counted, settle.candidates = work.candidates, settle.capacity = screen.capacity;
  settle.overflowed = list, settle.overflowed_count = &work.report->overflowed;
  REFINE_FAST_TRY(cudaMemsetAsync(settle.overflowed_count, 0, sizeof(int32_t), static_cast<cudaStream_t>(band.stream)));
  REFINE_FAST_TRY(launch(settle_kernel, active_count, kSettleThreads, 0, band.stream, settle));

  Workspace::Report report;
  REFINE_FAST_TRY(read_report(work, band.stream, &report));
  *overflowed = report.overflowed, *bad_row = report.bad_row;
  if (report.overflowed == 0 || report.bad_row != kNoBadRow) return cudaSuccess;
  const int64_t middle = begin + round_up((end - begin) / 2, kPanel);
  int32_t again = 0;
  REFINE_FAST_TRY(search(band, work, docs, first_id, begin, middle, list, report.overflowed, level + 1, bad_row, &again));
  return search(band, work, docs, first_id, middle, end, list, report.overflowed, level + 1, bad_row, &again);
}

}  // namespace
}  // namespace refine_fast

using namespace refine_fast;

extern "C" int64_t refine_fast_cuda_band_bytes(const CudaBand* band) { return Workspace(*band).bytes; }

extern "C" int refine_fast_cuda_band_set_queries(CudaBand* band, const void* queries, Dtype dtype, int64_t row_stride, uint64_t* bad_row) {
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
  const Begin begin = {rule_of(*band), work.lists,  {band->offsets, band->ids}, band->seed,  band->first, band->rows,
                       band->hi,       work.query_norms, work.edges,            work.states, work.found,  work.counted};
  REFINE_FAST_TRY(launch(begin_kernel, (band->rows + 255) / 256, 256, 0, band->stream, begin));
  Workspace::Report report;
  REFINE_FAST_TRY(read_report(work, band->stream, &report));
  *bad_row = report.bad_row;
  return cudaSuccess;
}

extern "C" int refine_fast_cuda_band_push(CudaBand* band, const void* docs, Dtype dtype, int64_t row_stride, int64_t rows, int64_t first_id,
                                          uint64_t* bad_row) {
  const Workspace work(*band);
  const Rows source = {docs, row_stride, dtype};
  Pack pack = {};
  pack.rows = source, pack.count = rows, pack.d = band->d, pack.first_id = first_id;
  pack.width = static_cast<int32_t>(round_up(band->d, kTileK)), pack.normalize = band->normalize != 0;
  pack.packed = work.docs, pack.norms = work.doc_norms, pack.panels = work.doc_panels, pack.bad_row = &work.report->bad_row;
  REFINE_FAST_TRY(launch_pack(pack, band->stream));
  unsigned long long bad = kNoBadRow;
  for (int64_t begin = 0; begin < rows && bad == kNoBadRow;) {
    const int64_t end = std::min(rows, begin + band->piece);
    int32_t overflowed = 0;
    REFINE_FAST_TRY(search(*band, work, source, first_id, begin, end, nullptr, band->rows, 0, &bad, &overflowed));
    begin = end;
    if (overflowed > band->rows / 16) band->piece = std::max(work.capacity, round_up(band->piece / 2, kPanel));
    else band->piece = std::min(2 * band->piece, round_up(band->block, kPanel));
  }
  *bad_row = bad;
  return cudaSuccess;
}

extern "C" int refine_fast_cuda_band_finish(const CudaBand* band, int64_t* ids, float* scores, int64_t* in_band) {
  const Workspace work(*band);
  const Finish finish = {rule_of(*band), work.lists, band->k, work.states, ids, scores, in_band};
  return launch(finish_kernel, band->rows, kSettleThreads, 0, band->stream, finish);
}
