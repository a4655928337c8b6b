// AVX-512 with VDPBF16PS and VPDPWSSD: two bf16, or two 16-bit integer, products into each of 16 sums.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include <immintrin.h>

#include "core/kernels.h"
#include "isa/pack_avx512.h"
#include "isa/screen_i16.h"
#include "isa/simd_avx512.h"

namespace refine_fast {
namespace {

// --- matmul: the 12 x 32 tile of avx512.cc with a pair of bf16 where a float was: a panel is words of two neighbours along k.

constexpr int kMr = 12, kNr = 32, kKr = 2;

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const int32_t *pa = static_cast<const int32_t*>(a), *pb = static_cast<const int32_t*>(b);
  __m512 sum[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {  // C is far away (info_nce adds to matrices of many MB): it arrives while the sums are made
    _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc + 16), _MM_HINT_T0);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) _mm_prefetch(c + i * ldc, _MM_HINT_T0), _mm_prefetch(c + i * ldc + 16, _MM_HINT_T0);
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; p += kKr, pa += kMr, pb += kNr) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(pb), b1 = (__m512bh)_mm512_loadu_si512(pb + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pa[i]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0), sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i, c += ldc) {
    _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum[i][0]) : sum[i][0]);
    _mm512_storeu_ps(c + 16, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c + 16), sum[i][1]) : sum[i][1]);
  }
}

const MatmulKernels matmul_bf16 = {kMr, kNr, kKr, 2, pack_panel_bf16<kMr, kKr>, pack_panel_bf16<kNr, kKr>, tile,
                                   pack_panel_words<kNr, kKr>};

struct FusedWords : Words {
  static Sum dot(Sum sum, __m512i x, __m512i y) { return (Sum)_mm512_dpwssd_epi32((__m512i)sum, x, y); }
};

}  // namespace

extern const Kernels avx512_bf16_kernels = {
    .isa = Isa::avx512_bf16,
    .matmul_f32 = nullptr,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .screen = &screen_i16<FusedWords, kMr>,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
