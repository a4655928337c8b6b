// AVX-512 (F, BW, DQ, VL): 32 zmm registers, 2 FMA of 16 floats a cycle.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include <immintrin.h>

#include "core/kernels.h"
#include "isa/pack_avx512.h"

namespace refine_fast {
namespace {

// --- matmul: 12 x 32 floats in 24 accumulators. A step of k loads 2 vectors of B and broadcasts 12 floats of A for 24 FMAs: 12 cycles of FMA
// against 7 of loads, and 24 chains hide the FMA's latency of 4 twice over.

constexpr int kMr = 12, kNr = 32;

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const float *pa = static_cast<const float*>(a), *pb = static_cast<const float*>(b);
  __m512 sum[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; ++p, pa += kMr, pb += kNr) {
    const __m512 b0 = _mm512_loadu_ps(pb), b1 = _mm512_loadu_ps(pb + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const __m512 x = _mm512_set1_ps(pa[i]);
      sum[i][0] = _mm512_fmadd_ps(x, b0, sum[i][0]), sum[i][1] = _mm512_fmadd_ps(x, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i, c += ldc) {
    _mm512_storeu_ps(c, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c), sum[i][0]) : sum[i][0]);
    _mm512_storeu_ps(c + 16, accumulate ? _mm512_add_ps(_mm512_loadu_ps(c + 16), sum[i][1]) : sum[i][1]);
  }
}

const MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack_panel_f32<kMr, false>, pack_panel_f32<kNr, false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack_panel_f32<kMr, true>, pack_panel_f32<kNr, true>, tile};

}  // namespace

extern const Kernels avx512_kernels = {
    .isa = Isa::avx512,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
