// The screen of band_topk as the level's float32 product, for levels where no narrower format multiplies faster.
// Nothing is rounded.
#pragma once
#include "kernels/kernels.h"
#include "kernels/screen_kernels.h"

namespace refine_fast {
namespace {

template <auto kPack>
void screen_pack_f32(const float* rows, int64_t stride, int64_t count, int64_t d, const double*, void* panel,
                     double* residuals) {
  for (int64_t r = 0; r < count; ++r) residuals[r] = 0;
  kPack(rows, stride, 1, count, d, panel);
}

template <auto kTile>
void screen_tile_f32(const void* a, const void* b, int64_t d, float* scores, int64_t ld) {
  kTile(a, b, d, scores, ld, false);
}

template <auto kMatmul>
constexpr ScreenKernels screen_f32 = {
    .mr = kMatmul->mr,
    .nr = kMatmul->nr,
    .kr = kMatmul->kr,
    .element_bytes = 4,
    .scale_bytes = 0,
    .exact = false,
    .pack_a = screen_pack_f32<kMatmul->pack_a>,
    .pack_b = screen_pack_f32<kMatmul->pack_b>,
    .tile = screen_tile_f32<kMatmul->tile>,
};

}  // namespace
}  // namespace refine_fast
