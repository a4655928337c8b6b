// AVX2 + FMA + F16C: 16 ymm registers, 2 FMA of 8 floats a cycle.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include <immintrin.h>

#include "core/kernels.h"

namespace refine_fast {
namespace {

// --- conversions ---------------------------------------------------------------------------------------------------------------------

__m256 widen(__m128i half, Dtype dtype) {
  return dtype == Dtype::f16 ? _mm256_cvtph_ps(half) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// bf16 in the upper half of each word, the lower half 0. In integers: VCVTNEPS2BF16 would flush denormals. NaN stays a quiet NaN.
__m256i round_to_bf16(__m256 f) {
  const __m256i x = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)), quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  return _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_set1_epi32(~0xffff));
}

__m128i narrow(__m256 f, Dtype dtype) {
  if (dtype == Dtype::f16) return _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT);
  const __m256i words = _mm256_srli_epi32(round_to_bf16(f), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

void to_f32(const void* src, Dtype dtype, int64_t n, float* dst) {
  if (dtype == Dtype::f32 || dtype == Dtype::f64) return scalar_kernels.to_f32(src, dtype, n, dst);
  const uint16_t* half = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i)), dtype));
  scalar_kernels.to_f32(half + i, dtype, n - i, dst + i);
}

void from_f32(const float* src, Dtype dtype, int64_t n, void* dst) {
  if (dtype == Dtype::f32 || dtype == Dtype::f64) return scalar_kernels.from_f32(src, dtype, n, dst);
  uint16_t* half = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), narrow(_mm256_loadu_ps(src + i), dtype));
  scalar_kernels.from_f32(src + i, dtype, n - i, half + i);
}

// --- matmul: 6 x 16 floats in 12 of the 16 registers; panels k-major ------------------------------------------------------------------

constexpr int kMr = 6, kNr = 16;

template <int kWidth, bool kRound>
void pack(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  float* out = static_cast<float*>(panel);
  if (stride == 1 && rows == kWidth) {
    for (int64_t p = 0; p < k; ++p) __builtin_memcpy(out + p * kWidth, src + p * k_stride, kWidth * sizeof(float));
  } else {
    // eight of k at a time, so that a row that runs along k is read by cache lines
    for (int64_t p0 = 0; p0 < k; p0 += 8)
      for (int64_t r = 0; r < kWidth; ++r)
        for (int64_t p = p0; p < k && p < p0 + 8; ++p) out[p * kWidth + r] = r < rows ? src[r * stride + p * k_stride] : 0.0f;
  }
  if (!kRound) return;
  int64_t i = 0;
  for (; i + 8 <= kWidth * k; i += 8) _mm256_storeu_ps(out + i, _mm256_castsi256_ps(round_to_bf16(_mm256_loadu_ps(out + i))));
  for (; i < kWidth * k; ++i) {
    const __m256i bits = round_to_bf16(_mm256_set1_ps(out[i]));
    out[i] = _mm256_cvtss_f32(_mm256_castsi256_ps(bits));
  }
}

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const float *pa = static_cast<const float*>(a), *pb = static_cast<const float*>(b);
  __m256 sum[kMr][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (int64_t p = 0; p < k; ++p, pa += kMr, pb += kNr) {
    const __m256 b0 = _mm256_loadu_ps(pb), b1 = _mm256_loadu_ps(pb + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kMr; ++i) {
      const __m256 x = _mm256_broadcast_ss(pa + i);
      sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]), sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i, c += ldc) {
    _mm256_storeu_ps(c, accumulate ? _mm256_add_ps(_mm256_loadu_ps(c), sum[i][0]) : sum[i][0]);
    _mm256_storeu_ps(c + 8, accumulate ? _mm256_add_ps(_mm256_loadu_ps(c + 8), sum[i][1]) : sum[i][1]);
  }
}

const MatmulKernels matmul_f32 = {kMr, kNr, 1, 4, pack<kMr, false>, pack<kNr, false>, tile};
const MatmulKernels matmul_bf16 = {kMr, kNr, 1, 4, pack<kMr, true>, pack<kNr, true>, tile};

}  // namespace

extern const Kernels avx2_kernels = {
    .isa = Isa::avx2,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = to_f32,
    .from_f32 = from_f32,
};

}  // namespace refine_fast
