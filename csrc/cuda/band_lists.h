// Sorted lists of hits in GPU memory, worked on by all threads of a block.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/band_state.h"

namespace refine_fast {

constexpr int kSettleThreads = 128;  // of a block
constexpr int kBatch = 512;          // candidates that are settled at a time

struct Hit {
  double score;
  int64_t id;
};

struct Lists {
  Hit *hits, *drawn;  // (rows, kept): most similar first; (rows, drawn): smallest hash first
  int32_t kept, drawn_room;
};

struct MoreSimilar {
  __device__ bool operator()(const Hit& a, const Hit& b) const {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
  }
};
struct SmallerHash {
  const Query& query;
  __device__ bool operator()(const Hit& a, const Hit& b) const { return hash(query, a.id) < hash(query, b.id); }
};

// Sorts in place with all threads of the block: the bitonic network in which every comparison moves the earlier element
// forward. Elements beyond count would be the last of all and would not move, so they need not exist.
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
      for (int t = threadIdx.x; t < pairs; t += blockDim.x)
        exchange(t / step * step * 2 + t % step, t / step * step * 2 + t % step + step);
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
    if (before(list[middle], hit))
      low = middle + 1;
    else
      count = middle;
  }
  return low;
}

// Merges `fresh` (sorted, at most kBatch) into `list` (sorted, `room` places) with all threads of the block; returns
// the new count.
template <class Before>
__device__ int merge(Hit* list, int count, int room, const Hit* fresh, int fresh_count, Before before) {
  if (fresh_count == 0 || room == 0) return count;
  int place[kBatch / kSettleThreads];
#pragma unroll
  for (int i = 0; i < kBatch / kSettleThreads; ++i) {
    const int own = i * kSettleThreads + static_cast<int>(threadIdx.x);
    place[i] = own < fresh_count ? own + rank(list, count, fresh[own], before) : room;
  }
  // Hits move only towards the end, so the last of them move first.
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

}  // namespace refine_fast
