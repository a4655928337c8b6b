// AVX-512 (F, BW, DQ, VL): 32 zmm registers, 2 FMA of 16 floats a cycle. Includes only intrinsics and POD headers, and
// everything is static: a weak symbol compiled here could be merged into baseline code.
#include <immintrin.h>

#include <cstddef>

#include "isa/loss_simd.h"
#include "isa/pack_avx512.h"
#include "isa/screen_int.h"
#include "isa/simd_avx512.h"
#include "isa/tile_avx512.h"
#include "kernels/kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {
namespace {

// --- matmul: the tile of isa/tile_avx512.h over floats -------------------------------------------

struct FloatWords {
  using Word = float;
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 broadcast(float x) { return _mm512_set1_ps(x); }
  static __m512 multiply_add(__m512 sum, __m512 x, __m512 y) { return _mm512_fmadd_ps(x, y, sum); }
};
constexpr auto tile = tile_avx512<FloatWords, 1>;

const MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack_panel_f32<kMr, false>, pack_panel_f32<kNr, false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack_panel_f32<kMr, true>, pack_panel_f32<kNr, true>, tile};

// --- select: most scores lie below the band, so four comparisons and one branch dismiss 64 of them ---

void append(const float* scores, int64_t n, int32_t first, BandList* list) {
  const BandThresholds t = list->thresholds;
  const __m512 floor = _mm512_set1_ps(t.floor), sure = _mm512_set1_ps(t.sure), keep = _mm512_set1_ps(t.keep),
               ceil = _mm512_set1_ps(t.ceil);
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int32_t* const index = list->index + list->size;
  float* const score = list->score + list->size;
  int64_t appended = 0, between = 0;
  for (int64_t j = 0; j < n; j += 64) {
    __m512 s[4];
    __mmask16 hit[4];
    for (int v = 0; v < 4; ++v) {
      const int64_t left = n - j - 16 * v;
      s[v] = left >= 16 ? _mm512_loadu_ps(scores + j + 16 * v)
                        : _mm512_mask_loadu_ps(nan, static_cast<__mmask16>(left <= 0 ? 0 : (1u << left) - 1),
                                               scores + j + 16 * v);
      hit[v] = _mm512_cmp_ps_mask(s[v], floor, _CMP_GE_OQ);
    }
    if ((hit[0] | hit[1] | hit[2] | hit[3]) == 0) continue;
    for (int v = 0; v < 4; ++v) {
      const __mmask16 unsure = _mm512_mask_cmp_ps_mask(hit[v], s[v], sure, _CMP_LT_OQ);
      const __mmask16 kept = _mm512_mask_cmp_ps_mask(hit[v], s[v], keep, _CMP_GE_OQ);
      const __mmask16 chosen = unsure | _mm512_mask_cmp_ps_mask(kept, s[v], ceil, _CMP_LE_OQ);
      between += __builtin_popcount(hit[v] & ~unsure & ~kept);
      // compressed in a register, since vpcompressps to memory is microcoded on Zen
      _mm512_storeu_ps(score + appended, _mm512_maskz_compress_ps(chosen, s[v]));
      _mm512_storeu_si512(
          index + appended,
          _mm512_maskz_compress_epi32(
              chosen, _mm512_add_epi32(iota, _mm512_set1_epi32(first + static_cast<int32_t>(j) + 16 * v))));
      appended += __builtin_popcount(chosen);
    }
  }
  list->size += appended, list->counted += between;
}

// 4 accumulators of 8 lanes
double dot(const float* x, const float* y, int64_t d) {
  __m512d lane[4];
  for (int v = 0; v < 4; ++v) lane[v] = _mm512_setzero_pd();
  int64_t i = 0;
  for (; i + 32 <= d; i += 32)
    for (int v = 0; v < 4; ++v)
      lane[v] = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8 * v)),
                                _mm512_cvtps_pd(_mm256_loadu_ps(y + i + 8 * v)), lane[v]);
  if (i < d) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t left = d - i - 8 * v;
      const __mmask8 mask = static_cast<__mmask8>(left >= 8 ? 0xff : left <= 0 ? 0 : (1u << left) - 1);
      const __m256 a = _mm256_maskz_loadu_ps(mask, x + i + 8 * v), b = _mm256_maskz_loadu_ps(mask, y + i + 8 * v);
      lane[v] = _mm512_fmadd_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b), lane[v]);
    }
  }
  const __m512d fold = _mm512_add_pd(_mm512_add_pd(lane[0], lane[1]), _mm512_add_pd(lane[2], lane[3]));
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(fold), _mm512_extractf64x4_pd(fold, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

const SelectKernels select_kernels = {append, dot};

}  // namespace

extern const Kernels avx512_kernels = {
    .isa = Isa::avx512,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,  // bound by memory: 256 bits are enough
    .screen = &screen_int<Words, kMr>,
    .select = &select_kernels,
    .loss = &loss_kernels<Floats>,
    .fused_loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
