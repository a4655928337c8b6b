// Integer arithmetic that the CPU core and the CUDA kernels share.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define REFINE_FAST_HOST_DEVICE __host__ __device__
#else
#define REFINE_FAST_HOST_DEVICE
#endif

namespace refine_fast {

// The largest multiple of `step` that is <= x, and the smallest that is >= x, for x >= 0.
REFINE_FAST_HOST_DEVICE constexpr int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
REFINE_FAST_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
REFINE_FAST_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }

// The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); refine_fast.reference.hash64 computes the same
// values.
REFINE_FAST_HOST_DEVICE constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;  // splitmix64's increment

// The hash that orders the documents of a random draw: first of (seed, query), then of that and a document.
REFINE_FAST_HOST_DEVICE constexpr uint64_t hash_query(uint64_t seed, int64_t query) {
  return mix(mix(seed + kGolden) + static_cast<uint64_t>(query) * kGolden);
}
REFINE_FAST_HOST_DEVICE constexpr uint64_t hash_document(uint64_t query_hash, int64_t document) {
  return mix(query_hash + static_cast<uint64_t>(document) * kGolden);
}

}  // namespace refine_fast
