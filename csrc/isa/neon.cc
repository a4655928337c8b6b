// NEON (Armv8-A): 32 registers of 4 floats. Includes only intrinsics and POD headers, and everything is static: a weak
// symbol compiled here could be merged into baseline code.
#include <arm_neon.h>

#include <cstddef>

#include "isa/loss_simd.h"
#include "isa/screen_f32.h"
#include "kernels/kernels.h"
#include "kernels/lerp_kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {
namespace {

// --- matmul: 8 x 12 floats in 24 accumulators; panels k-major ------------------------------------

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
      for (int64_t p = p0; p < k && p < p0 + 8; ++p)
        out[p * kWidth + r] = r < rows ? src[r * stride + p * k_stride] : 0.0f;
  if (!kRound) return;
  for (int64_t i = 0; i < kWidth * k; i += 4)
    vst1q_f32(out + i, vreinterpretq_f32_u32(round_to_bf16(vld1q_f32(out + i))));
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
      sum[i][0] = vfmaq_f32(sum[i][0], x, b0), sum[i][1] = vfmaq_f32(sum[i][1], x, b1),
      sum[i][2] = vfmaq_f32(sum[i][2], x, b2);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i, c += ldc)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j)
      vst1q_f32(c + 4 * j, accumulate ? vaddq_f32(vld1q_f32(c + 4 * j), sum[i][j]) : sum[i][j]);
}

constexpr MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack<kMr, false>, pack<kNr, false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack<kMr, true>, pack<kNr, true>, tile};

// --- select: most scores lie below the band, so four comparisons and one branch dismiss 16 of them ---

void append(const float* scores, int64_t n, int32_t first, BandList* list) {
  const float32x4_t floor = vdupq_n_f32(list->thresholds.floor);
  for (int64_t begin = 0; begin < n; begin += 16) {
    const float* s = scores + begin;
    if (n - begin >= 16) {
      const uint32x4_t low = vorrq_u32(vcgeq_f32(vld1q_f32(s), floor), vcgeq_f32(vld1q_f32(s + 4), floor));
      const uint32x4_t high = vorrq_u32(vcgeq_f32(vld1q_f32(s + 8), floor), vcgeq_f32(vld1q_f32(s + 12), floor));
      if (vmaxvq_u32(vorrq_u32(low, high)) == 0) continue;
    }
    const int64_t left = n - begin < 16 ? n - begin : 16;
    scalar_kernels.select->append(s, left, first + static_cast<int32_t>(begin), list);
  }
}

// 16 accumulators of 2 lanes
double dot(const float* x, const float* y, int64_t d) {
  float64x2_t lane[16];
#pragma GCC unroll 16
  for (int v = 0; v < 16; ++v) lane[v] = vdupq_n_f64(0.0);
  const auto step = [&lane](const float* a, const float* b) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const float32x4_t p = vld1q_f32(a + 4 * v), q = vld1q_f32(b + 4 * v);
      lane[2 * v] = vfmaq_f64(lane[2 * v], vcvt_f64_f32(vget_low_f32(p)), vcvt_f64_f32(vget_low_f32(q)));
      lane[2 * v + 1] = vfmaq_f64(lane[2 * v + 1], vcvt_high_f64_f32(p), vcvt_high_f64_f32(q));
    }
  };
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) step(x + i, y + i);
  if (i < d) {
    float a[32] = {}, b[32] = {};
    for (int64_t j = 0; i + j < d; ++j) a[j] = x[i + j], b[j] = y[i + j];
    step(a, b);
  }
  float64x2_t fold[4];
  for (int j = 0; j < 4; ++j)
    fold[j] = vaddq_f64(vaddq_f64(lane[j], lane[j + 4]), vaddq_f64(lane[j + 8], lane[j + 12]));
  return vaddvq_f64(vaddq_f64(vaddq_f64(fold[0], fold[2]), vaddq_f64(fold[1], fold[3])));
}

const SelectKernels select_kernels = {append, dot};

// --- lerp: bound by the loads; the ragged tail goes through one padded vector --------------------

float32x4_t lerp_step(float32x4_t a, float32x4_t b, float32x4_t w, bool from_base) {
  return vbslq_f32(vceqq_f32(a, b), a, vfmaq_f32(from_base ? a : b, w, vsubq_f32(b, a)));
}

void lerp_f32(const float* base, const float* tuned, int64_t n, float weight, float* out) {
  const bool from_base = __builtin_fabsf(weight) < 0.5f;
  const float32x4_t w = vdupq_n_f32(from_base ? weight : weight - 1.0f);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, lerp_step(vld1q_f32(base + i), vld1q_f32(tuned + i), w, from_base));
  if (i == n) return;
  float a[4] = {}, b[4] = {};
  __builtin_memcpy(a, base + i, static_cast<size_t>(n - i) * 4);
  __builtin_memcpy(b, tuned + i, static_cast<size_t>(n - i) * 4);
  vst1q_f32(a, lerp_step(vld1q_f32(a), vld1q_f32(b), w, from_base));
  __builtin_memcpy(out + i, a, static_cast<size_t>(n - i) * 4);
}

void lerp_f64(const double* base, const double* tuned, int64_t n, double weight, double* out) {
  const bool from_base = __builtin_fabs(weight) < 0.5;
  const double w = from_base ? weight : weight - 1.0;
  for (int64_t i = 0; i < n; ++i) {
    const double a = base[i], b = tuned[i];
    out[i] = a == b ? a : __builtin_fma(w, b - a, from_base ? a : b);
  }
}

// float32 sums over at most a few thousand elements, spread over 4 lanes: relative error below 1e-4
void lerp_change(const float* base, const float* out, int64_t n, Change* change) {
  float32x4_t moved = vdupq_n_f32(0), size = vdupq_n_f32(0);
  uint32x4_t finite = vdupq_n_u32(0);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float32x4_t a = vld1q_f32(base + i), o = vld1q_f32(out + i), d = vsubq_f32(o, a), zero = vsubq_f32(o, o);
    moved = vfmaq_f32(moved, d, d);
    size = vfmaq_f32(size, a, a);
    finite = vsubq_u32(finite, vceqq_f32(zero, zero));
  }
  change->change_squared += vaddvq_f32(moved);
  change->base_squared += vaddvq_f32(size);
  change->not_finite += i - static_cast<int64_t>(vaddvq_u32(finite));
  for (; i < n; ++i) {
    const float d = out[i] - base[i];
    change->change_squared += d * d;
    change->base_squared += base[i] * base[i];
    change->not_finite += out[i] - out[i] != 0.0f;
  }
}

const LerpKernels lerp = {lerp_f32, lerp_f64, nullptr, lerp_change};

// --- loss ----------------------------------------------------------------------------------------

struct Floats {
  using Float = float32x4_t;
  static constexpr int width = 4;
  static float32x4_t load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, float32x4_t x) { vst1q_f32(p, x); }
  static float32x4_t set(float x) { return vdupq_n_f32(x); }
  static float32x4_t add(float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }
  static float32x4_t sub(float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); }
  static float32x4_t mul(float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }
  static float32x4_t fma(float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }
  static float32x4_t max(float32x4_t x, float32x4_t y) { return vmaxq_f32(x, y); }  // NaN if either is NaN
  static float32x4_t round(float32x4_t x) { return vrndnq_f32(x); }
  static float32x4_t exp2_integer(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static uint32x4_t below(float32x4_t x, float32x4_t y) { return vcltq_f32(x, y); }
  static uint32x4_t equal(const int32_t* ids, int32_t id) { return vceqq_s32(vld1q_s32(ids), vdupq_n_s32(id)); }
  static float32x4_t where(uint32x4_t mask, float32x4_t x, float32x4_t y) { return vbslq_f32(mask, x, y); }
  static float total(float32x4_t x) { return vaddvq_f32(x); }
  static float largest(float32x4_t x) { return vmaxvq_f32(x); }
};

}  // namespace

extern const Kernels neon_kernels = {
    .isa = Isa::neon,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = &lerp,
    .screen = &screen_f32<&matmul_f32>,
    .select = &select_kernels,
    .loss = &loss_kernels<Floats>,
    .fused_loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
