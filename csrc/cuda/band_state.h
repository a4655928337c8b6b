// Data that the kernels of band_topk share: packed operands, and the state of a query.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/numeric.h"

namespace refine_fast {

constexpr int kPanel = 256;  // rows that share a scale, and documents that share a margin
constexpr int kTileK = 64;   // a packed row is a multiple of this
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// The part of a query that the screen reads for every tile: lo rounded down, or inf if nothing can qualify; |x - x'|;
// |x| + |x - x'|; its scale.
struct alignas(16) Edge {
  float low, residual, reach, scale;
};
// A panel of packed rows: its scale, and the largest norm and |y - y'| in it.
struct alignas(16) Panel {
  float scale, size, residual, unused;
};

// The state of a query.
struct Query {
  double hi, norm;        // norm: the divisor of its scores
  int64_t above, inside;  // documents above the band, in the band
  int64_t excluded_at;    // index in ids of the first excluded document not yet passed, and that document
  int64_t excluded;
  uint64_t hash, last_hash;  // of (seed, query); the largest that is drawn, all ones until `drawn` is full
  float best, top;           // a certain score below `best` is only counted; one above `top` is dropped
  int32_t kept, drawn;
};

__device__ inline uint64_t hash(const Query& query, int64_t id) { return hash_document(query.hash, id); }

struct Exclude {
  const int64_t *offsets, *ids;
};

// The first index in [begin, end) whose id is not below `id`.
__device__ inline int64_t lower_bound(const int64_t* ids, int64_t begin, int64_t end, int64_t id) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < id)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

}  // namespace refine_fast
