// The screen of the AMX level: the tiles' product of rows rounded to bf16. Other tile formats have too few digits for a
// narrow margin.
#pragma once
#include "isa/amx_tiles.h"
#include "kernels/screen_kernels.h"

namespace refine_fast {
namespace {

template <auto kPack>
void screen_pack(const float* rows, int64_t stride, int64_t count, int64_t d, const double*, void* panel,
                 double* residuals) {
  for (int64_t r = 0; r < count; ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < d; p += 16) {
      const __m512 x = load_floats(rows + r * stride + p, 1, d - p);
      const __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
      const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(rounded));  // exact: both lie within a factor of two
      sum = _mm512_fmadd_ps(left, left, sum);
    }
    // 2^-126: for squares that underflow, in a row below 1e-16
    residuals[r] = _mm512_reduce_add_ps(sum) + static_cast<double>(d) * 0x1p-126;
  }
  kPack(rows, stride, 1, count, d, panel);
}

void screen_tile(const void* a, const void* b, int64_t d, float* scores, int64_t ld) {
  tile(a, b, d, scores, ld, false);
}

const ScreenKernels screen = {
    .mr = kMr,
    .nr = kNr,
    .kr = kKr,
    .element_bytes = 2,
    .scale_bytes = 0,
    .exact = false,
    .pack_a = screen_pack<pack_a>,
    .pack_b = screen_pack<pack_panel_bf16<kNr, kKr>>,
    .tile = screen_tile,
    .begin_tiles = begin_tiles,
    .end_tiles = end_tiles,
};

}  // namespace
}  // namespace refine_fast
