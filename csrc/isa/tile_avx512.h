// The 12 x 32 tile of the AVX-512 levels in 24 accumulators, over a format V of the packed words (one float, or two
// neighbouring bf16, of k).
//
// A step loads 2 vectors of B and broadcasts 12 words of A for 24 multiply-adds:
//     unit              instructions a step   cycles a step
//     FMA (2 a cycle)          24                  12
//     load (2 a cycle)         14                   7
// The 24 chains of sums hide an FMA latency of 4 twice over.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace refine_fast {
namespace {

constexpr int kMr = 12, kNr = 32;

// C is far away (info_nce adds to matrices of many MB): it is prefetched while the sums are computed.
template <class V, int kWordsOfK>
void tile_avx512(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const auto *pa = static_cast<const typename V::Word*>(a), *pb = static_cast<const typename V::Word*>(b);
  __m512 sum[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc + 16), _MM_HINT_T0);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; p += kWordsOfK, pa += kMr, pb += kNr) {
    const auto b0 = V::load(pb), b1 = V::load(pb + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const auto x = V::broadcast(pa[i]);
      sum[i][0] = V::multiply_add(sum[i][0], x, b0), sum[i][1] = V::multiply_add(sum[i][1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i, c += ldc) {
    _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum[i][0]) : sum[i][0]);
    _mm512_storeu_ps(c + 16, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c + 16), sum[i][1]) : sum[i][1]);
  }
}

}  // namespace
}  // namespace refine_fast
