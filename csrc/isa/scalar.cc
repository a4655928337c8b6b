// Plain C++: the level that every machine has. Each kernel is stated in its simplest form. Includes only intrinsics and
// POD headers, and everything is static: a weak symbol compiled here could be merged into baseline code.
#include <cstddef>

#include "isa/loss_simd.h"
#include "isa/screen_f32.h"
#include "kernels/kernels.h"
#include "kernels/lerp_kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {
namespace {

// --- conversions ---------------------------------------------------------------------------------

float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

uint16_t bf16_from_float(float f) {
  const uint32_t b = float_to_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((b >> 16) | 0x40u);  // NaN stays a quiet NaN
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

float float_from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float f = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -f : f;
}

uint16_t f16_from_float(float f) {
  const uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {  // a denormal half: the addition rounds to a multiple of 2^-24, nearest even
    const float r = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(r) - 0x3f000000u));
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (r >> 13));
}

void to_f32(const void* src, Dtype dtype, int64_t n, float* dst) {
  const uint16_t* half = static_cast<const uint16_t*>(src);
  switch (dtype) {
    case Dtype::f32: __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4); break;
    case Dtype::bf16:
      for (int64_t i = 0; i < n; ++i) dst[i] = bits_to_float(static_cast<uint32_t>(half[i]) << 16);
      break;
    case Dtype::f16:
      for (int64_t i = 0; i < n; ++i) dst[i] = float_from_f16(half[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(static_cast<const double*>(src)[i]);
      break;
  }
}

void from_f32(const float* src, Dtype dtype, int64_t n, void* dst) {
  uint16_t* half = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case Dtype::f32: __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4); break;
    case Dtype::bf16:
      for (int64_t i = 0; i < n; ++i) half[i] = bf16_from_float(src[i]);
      break;
    case Dtype::f16:
      for (int64_t i = 0; i < n; ++i) half[i] = f16_from_float(src[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(dst)[i] = src[i];
      break;
  }
}

// --- matmul: panels are k-major, one element of each of the 4 rows (columns) after the other -----

constexpr int kMr = 4, kNr = 4;

template <bool kRound>
void pack(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  float* out = static_cast<float*>(panel);
  for (int64_t p = 0; p < k; ++p)
    for (int64_t r = 0; r < kMr; ++r) {
      const float x = r < rows ? src[r * stride + p * k_stride] : 0.0f;
      *out++ = kRound ? bits_to_float(static_cast<uint32_t>(bf16_from_float(x)) << 16) : x;
    }
}

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const float *pa = static_cast<const float*>(a), *pb = static_cast<const float*>(b);
  float sum[kMr][kNr] = {};
  for (int64_t p = 0; p < k; ++p, pa += kMr, pb += kNr)
    for (int i = 0; i < kMr; ++i)
      for (int j = 0; j < kNr; ++j) sum[i][j] += pa[i] * pb[j];
  for (int i = 0; i < kMr; ++i)
    for (int j = 0; j < kNr; ++j) c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sum[i][j];
}

constexpr MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack<false>, pack<false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack<true>, pack<true>, tile};

// --- select --------------------------------------------------------------------------------------

void append(const float* scores, int64_t n, int32_t first, BandList* list) {
  const BandThresholds t = list->thresholds;
  for (int64_t j = 0; j < n; ++j) {
    const float s = scores[j];
    if (!(s >= t.floor)) continue;
    if (s < t.sure || (s >= t.keep && s <= t.ceil)) {
      list->index[list->size] = first + static_cast<int32_t>(j);
      list->score[list->size++] = s;
    } else if (s < t.keep) {
      ++list->counted;
    }
  }
}

double dot(const float* x, const float* y, int64_t d) {
  double lane[32] = {};
  for (int64_t i = 0; i < d; ++i) lane[i & 31] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  double fold[8];
  for (int i = 0; i < 8; ++i) fold[i] = (lane[i] + lane[i + 8]) + (lane[i + 16] + lane[i + 24]);
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) fold[i] += fold[i + half];
  return fold[0];
}

const SelectKernels select_kernels = {append, dot};

// --- loss ----------------------------------------------------------------------------------------

struct Floats {
  using Float = float;
  static constexpr int width = 1;
  static float load(const float* p) { return *p; }
  static void store(float* p, float x) { *p = x; }
  static float set(float x) { return x; }
  static float add(float x, float y) { return x + y; }
  static float sub(float x, float y) { return x - y; }
  static float mul(float x, float y) { return x * y; }
  static float fma(float x, float y, float z) { return x * y + z; }
  static float max(float x, float y) { return x > y ? x : y; }  // y if either is NaN
  static float round(float x) { return __builtin_rintf(x); }
  static float exp2_integer(float n) {
    return bits_to_float((static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23);
  }
  static bool below(float x, float y) { return x < y; }
  static bool equal(const int32_t* ids, int32_t id) { return *ids == id; }
  static float where(bool mask, float x, float y) { return mask ? x : y; }
  static float total(float x) { return x; }
  static float largest(float x) { return x; }
};

// --- lerp: libm's fma rounds once, with or without the instruction -------------------------------

void lerp_f32(const float* base, const float* tuned, int64_t n, float weight, float* out) {
  const bool from_base = __builtin_fabsf(weight) < 0.5f;
  const float w = from_base ? weight : weight - 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float a = base[i], b = tuned[i];
    out[i] = a == b ? a : __builtin_fmaf(w, b - a, from_base ? a : b);
  }
}

void lerp_f64(const double* base, const double* tuned, int64_t n, double weight, double* out) {
  const bool from_base = __builtin_fabs(weight) < 0.5;
  const double w = from_base ? weight : weight - 1.0;
  for (int64_t i = 0; i < n; ++i) {
    const double a = base[i], b = tuned[i];
    out[i] = a == b ? a : __builtin_fma(w, b - a, from_base ? a : b);
  }
}

void lerp_change(const float* base, const float* out, int64_t n, Change* change) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = base[i], o = out[i];
    const double d = static_cast<double>(o) - a;
    change->change_squared += d * d;
    change->base_squared += static_cast<double>(a) * a;
    change->not_finite += o - o != 0.0f;
  }
}

const LerpKernels lerp = {lerp_f32, lerp_f64, nullptr, lerp_change};

}  // namespace

extern const Kernels scalar_kernels = {
    .isa = Isa::scalar,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = &lerp,
    .screen = &screen_f32<&matmul_f32>,
    .select = &select_kernels,
    .loss = &loss_kernels<Floats>,
    .fused_loss = nullptr,
    .to_f32 = to_f32,
    .from_f32 = from_f32,
};

}  // namespace refine_fast
