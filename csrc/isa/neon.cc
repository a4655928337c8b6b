// NEON (Armv8-A): 32 registers of 4 floats.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include <arm_neon.h>

#include "core/kernels.h"

namespace refine_fast {
namespace {

// --- matmul: 8 x 12 floats in 24 accumulators; panels k-major --------------------------------------------------------------------------

constexpr int kMr = 8, kNr = 12;

uint32x4_t round_to_bf16(float32x4_t f) {
  const uint32x4_t x = vreinterpretq_u32_f32(f), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff))), number = vceqq_f32(f, f);
  return vandq_u32(vbslq_u32(number, rounded, vorrq_u32(x, vdupq_n_u32(0x400000))), vdupq_n_u32(0xffff0000u));
}

template <int kWidth, bool kRound>
void pack(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  float* out = static_cast<float*>(panel);
  for (int64_t p0 = 0; p0 < k; p0 += 8)
    for (int64_t r = 0; r < kWidth; ++r)
      for (int64_t p = p0; p < k && p < p0 + 8; ++p) out[p * kWidth + r] = r < rows ? src[r * stride + p * k_stride] : 0.0f;
  if (!kRound) return;
  for (int64_t i = 0; i < kWidth * k; i += 4) vst1q_f32(out + i, vreinterpretq_f32_u32(round_to_bf16(vld1q_f32(out + i))));
}

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const float *pa = static_cast<const float*>(a), *pb = static_cast<const float*>(b);
  float32x4_t sum[kMr][3];
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = sum[i][2] = vdupq_n_f32(0.0f);
  for (int64_t p = 0; p < k; ++p, pa += kMr, pb += kNr) {
    const float32x4_t b0 = vld1q_f32(pb), b1 = vld1q_f32(pb + 4), b2 = vld1q_f32(pb + 8);
#pragma GCC unroll 8
    for (int i = 0; i < kMr; ++i) {
      const float32x4_t x = vdupq_n_f32(pa[i]);
      sum[i][0] = vfmaq_f32(sum[i][0], x, b0), sum[i][1] = vfmaq_f32(sum[i][1], x, b1), sum[i][2] = vfmaq_f32(sum[i][2], x, b2);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i, c += ldc)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) vst1q_f32(c + 4 * j, accumulate ? vaddq_f32(vld1q_f32(c + 4 * j), sum[i][j]) : sum[i][j]);
}

const MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack<kMr, false>, pack<kNr, false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack<kMr, true>, pack<kNr, true>, tile};

}  // namespace

extern const Kernels neon_kernels = {
    .isa = Isa::neon,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
