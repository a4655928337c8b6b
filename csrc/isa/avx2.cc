// AVX2, FMA and F16C: 16 ymm registers, 2 FMA of 8 floats a cycle. Includes only intrinsics and POD headers, and
// everything is static: a weak symbol compiled here could be merged into baseline code.
#include <immintrin.h>

#include <cstddef>

#include "isa/loss_simd.h"
#include "isa/screen_int.h"
#include "kernels/kernels.h"
#include "kernels/lerp_kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {
namespace {

// --- conversions ---------------------------------------------------------------------------------

__m256 widen(__m128i half, Dtype dtype) {
  return dtype == Dtype::f16 ? _mm256_cvtph_ps(half)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// bf16 in the upper half of each word, 0 in the lower half. In integer arithmetic, since VCVTNEPS2BF16 would flush
// denormals. NaN stays a quiet NaN.
__m256i round_to_bf16(__m256 f) {
  const __m256i x = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)),
                quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
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
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i)), dtype));
  scalar_kernels.to_f32(half + i, dtype, n - i, dst + i);
}

void from_f32(const float* src, Dtype dtype, int64_t n, void* dst) {
  if (dtype == Dtype::f32 || dtype == Dtype::f64) return scalar_kernels.from_f32(src, dtype, n, dst);
  uint16_t* half = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), narrow(_mm256_loadu_ps(src + i), dtype));
  scalar_kernels.from_f32(src + i, dtype, n - i, half + i);
}

// --- matmul: 6 x 16 floats in 12 of the 16 registers; panels k-major -----------------------------

constexpr int kMr = 6, kNr = 16;

void transpose(__m256i rows[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2)
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // u[i], u[i + 4]: rows 0-3, 4-7; words i and i + 4
    rows[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// The columns of kRows <= 8 rows with adjacent elements, 8 of them at a time; returns where the rest of k begins.
template <int kRows, int kWidth>
int64_t pack_columns(const float* src, int64_t stride, int64_t k, float* out) {
  int64_t p = 0;
  for (; p + 8 <= k; p += 8) {
    __m256i block[8];
    for (int r = 0; r < 8; ++r)
      block[r] = r < kRows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + r * stride + p))
                           : _mm256_setzero_si256();
    transpose(block);
    for (int i = 0; i < 8; ++i) {
      const __m256 column = _mm256_castsi256_ps(block[i]);
      float* to = out + (p + i) * kWidth;
      if (kRows == 8) {
        _mm256_storeu_ps(to, column);
      } else {
        _mm_storeu_ps(to, _mm256_castps256_ps128(column));
        _mm_storel_pi(reinterpret_cast<__m64*>(to + 4), _mm256_extractf128_ps(column, 1));
      }
    }
  }
  return p;
}

template <int kWidth, bool kRound>
void pack(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  static_assert(kWidth == 6 || kWidth == 16);
  float* out = static_cast<float*>(panel);
  if (stride == 1 && rows == kWidth) {
    for (int64_t p = 0; p < k; ++p) __builtin_memcpy(out + p * kWidth, src + p * k_stride, kWidth * sizeof(float));
  } else {
    int64_t begin = 0;
    if (k_stride == 1 && rows == kWidth) {
      begin = pack_columns<kWidth == 6 ? 6 : 8, kWidth>(src, stride, k, out);
      if (kWidth == 16) pack_columns<8, kWidth>(src + 8 * stride, stride, k, out + 8);
    }
    // eight of k at a time: a row along k is read by cache lines
    for (int64_t p0 = begin; p0 < k; p0 += 8)
      for (int64_t r = 0; r < kWidth; ++r)
        for (int64_t p = p0; p < k && p < p0 + 8; ++p)
          out[p * kWidth + r] = r < rows ? src[r * stride + p * k_stride] : 0.0f;
  }
  if (!kRound) return;
  int64_t i = 0;
  for (; i + 8 <= kWidth * k; i += 8)
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(round_to_bf16(_mm256_loadu_ps(out + i))));
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

// --- select: most scores lie below the band, so four comparisons and one branch dismiss 32 of them ---

void append(const float* scores, int64_t n, int32_t first, BandList* list) {
  const BandThresholds t = list->thresholds;
  const __m256 floor = _mm256_set1_ps(t.floor);
  for (int64_t j = 0; j < n; j += 32) {
    uint32_t hits = 0;
    if (n - j >= 32) {
      for (int v = 0; v < 4; ++v)
        hits |= static_cast<uint32_t>(
                    _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores + j + 8 * v), floor, _CMP_GE_OQ)))
                << (8 * v);
    } else {
      for (int64_t i = 0; i < n - j; ++i) hits |= static_cast<uint32_t>(scores[j + i] >= t.floor) << i;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int64_t i = j + __builtin_ctz(hits);
      const float s = scores[i];
      if (s < t.sure || (s >= t.keep && s <= t.ceil)) {
        list->index[list->size] = first + static_cast<int32_t>(i);
        list->score[list->size++] = s;
      } else if (s < t.keep) {
        ++list->counted;
      }
    }
  }
}

// 8 accumulators of 4 lanes
double dot(const float* x, const float* y, int64_t d) {
  __m256d lane[8];
  for (int v = 0; v < 8; ++v) lane[v] = _mm256_setzero_pd();
  int64_t i = 0;
  for (; i + 32 <= d; i += 32)
    for (int v = 0; v < 8; ++v) {
      const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * v)), b = _mm256_cvtps_pd(_mm_loadu_ps(y + i + 4 * v));
      lane[v] = _mm256_fmadd_pd(a, b, lane[v]);
    }
  if (i < d) {
    float a[32] = {}, b[32] = {};
    for (int64_t j = 0; i + j < d; ++j) a[j] = x[i + j], b[j] = y[i + j];
    for (int v = 0; v < 8; ++v)
      lane[v] =
          _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + 4 * v)), _mm256_cvtps_pd(_mm_loadu_ps(b + 4 * v)), lane[v]);
  }
  const __m256d low = _mm256_add_pd(_mm256_add_pd(lane[0], lane[2]), _mm256_add_pd(lane[4], lane[6]));
  const __m256d high = _mm256_add_pd(_mm256_add_pd(lane[1], lane[3]), _mm256_add_pd(lane[5], lane[7]));
  const __m256d four = _mm256_add_pd(low, high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

const SelectKernels select_kernels = {append, dot};

// --- loss ----------------------------------------------------------------------------------------

struct Floats {
  using Float = __m256;
  static constexpr int width = 8;
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
  static __m256 set(float x) { return _mm256_set1_ps(x); }
  static __m256 add(__m256 x, __m256 y) { return _mm256_add_ps(x, y); }
  static __m256 sub(__m256 x, __m256 y) { return _mm256_sub_ps(x, y); }
  static __m256 mul(__m256 x, __m256 y) { return _mm256_mul_ps(x, y); }
  static __m256 fma(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
  static __m256 max(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }  // y if either is NaN
  static __m256 round(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256 exp2_integer(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static __m256 below(__m256 x, __m256 y) { return _mm256_cmp_ps(x, y, _CMP_LT_OQ); }
  static __m256 equal(const int32_t* ids, int32_t id) {
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids)), _mm256_set1_epi32(id)));
  }
  static __m256 where(__m256 mask, __m256 x, __m256 y) { return _mm256_blendv_ps(y, x, mask); }
  static float total(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static float largest(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
};

// --- screen: 8 pairs of 16-bit integers ----------------------------------------------------------

struct Words : Floats {
  using Word = __m256i;
  static constexpr int packed = 2, largest_integer = 32766;  // below 32767: the scale is rounded to float
  using Sum = __v8si;  // and not __m256i: gcc 12 keeps a copy of each sum in either type
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n < 8 ? n : 8)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  using Floats::load;
  static __m256 load(const float* p, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(p) : n <= 0 ? _mm256_setzero_ps() : _mm256_maskload_ps(p, first(n));
  }
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i broadcast(int32_t pair) { return _mm256_set1_epi32(pair); }
  static __m256i load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_words(int32_t* p, __m256i x, int64_t n) { _mm256_maskstore_epi32(p, first(n), x); }
  static __m256i round_to_word(__m256 x) { return _mm256_cvtps_epi32(x); }
  static __m256 to_float(__m256i x) { return _mm256_cvtepi32_ps(x); }
  static __m256 to_float(Sum x) { return _mm256_cvtepi32_ps((__m256i)x); }
  static __m256i join(const __m256i n[2]) { return _mm256_blend_epi16(n[0], _mm256_slli_epi32(n[1], 16), 0xaa); }
  static Sum dot(Sum sum, __m256i x, __m256i y) { return sum + (Sum)_mm256_madd_epi16(x, y); }
  static void transpose(__m256i rows[8]) { refine_fast::transpose(rows); }
};

// --- lerp: bound by the loads; the ragged tail goes through one padded vector --------------------

__m256 lerp_step(__m256 a, __m256 b, __m256 w, bool from_base) {
  const __m256 r = _mm256_fmadd_ps(w, _mm256_sub_ps(b, a), from_base ? a : b);
  return _mm256_blendv_ps(r, a, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}

void lerp_f32(const float* base, const float* tuned, int64_t n, float weight, float* out) {
  const bool from_base = __builtin_fabsf(weight) < 0.5f;
  const __m256 w = _mm256_set1_ps(from_base ? weight : weight - 1.0f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, lerp_step(_mm256_loadu_ps(base + i), _mm256_loadu_ps(tuned + i), w, from_base));
  if (i == n) return;
  float a[8] = {}, b[8] = {};
  __builtin_memcpy(a, base + i, static_cast<size_t>(n - i) * 4);
  __builtin_memcpy(b, tuned + i, static_cast<size_t>(n - i) * 4);
  _mm256_storeu_ps(a, lerp_step(_mm256_loadu_ps(a), _mm256_loadu_ps(b), w, from_base));
  __builtin_memcpy(out + i, a, static_cast<size_t>(n - i) * 4);
}

__m256d lerp_step(__m256d a, __m256d b, __m256d w, bool from_base) {
  const __m256d r = _mm256_fmadd_pd(w, _mm256_sub_pd(b, a), from_base ? a : b);
  return _mm256_blendv_pd(r, a, _mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}

void lerp_f64(const double* base, const double* tuned, int64_t n, double weight, double* out) {
  const bool from_base = __builtin_fabs(weight) < 0.5;
  const __m256d w = _mm256_set1_pd(from_base ? weight : weight - 1.0);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    _mm256_storeu_pd(out + i, lerp_step(_mm256_loadu_pd(base + i), _mm256_loadu_pd(tuned + i), w, from_base));
  if (i == n) return;
  double a[4] = {}, b[4] = {};
  __builtin_memcpy(a, base + i, static_cast<size_t>(n - i) * 8);
  __builtin_memcpy(b, tuned + i, static_cast<size_t>(n - i) * 8);
  _mm256_storeu_pd(a, lerp_step(_mm256_loadu_pd(a), _mm256_loadu_pd(b), w, from_base));
  __builtin_memcpy(out + i, a, static_cast<size_t>(n - i) * 8);
}

// 16 bf16. Odd ones are the upper halves of words and even ones the lower: neither needs a shuffle.
void lerp_bf16(const uint16_t* base, const uint16_t* tuned, __m256 w, bool from_base, uint16_t* out) {
  const auto load = [](const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const auto odd = [](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(~0xffff))); };
  const __m256i a = load(base), b = load(tuned);
  const __m256i lower = _mm256_srli_epi32(round_to_bf16(lerp_step(even(a), even(b), w, from_base)), 16),
                upper = round_to_bf16(lerp_step(odd(a), odd(b), w, from_base));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(lower, upper));
}

// 16 fp16
void lerp_f16(const uint16_t* base, const uint16_t* tuned, __m256 w, bool from_base, uint16_t* out) {
  for (int i = 0; i < 16; i += 8) {
    const auto load = [&](const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)); };
    const __m256 r = lerp_step(_mm256_cvtph_ps(load(base)), _mm256_cvtph_ps(load(tuned)), w, from_base);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), narrow(r, Dtype::f16));
  }
}

// In registers: stores of float32 blocks to L1 and loads from it would take longer than memory does.
void lerp_half(const uint16_t* base, const uint16_t* tuned, Dtype dtype, int64_t n, float weight, uint16_t* out) {
  const bool from_base = __builtin_fabsf(weight) < 0.5f;
  const __m256 w = _mm256_set1_ps(from_base ? weight : weight - 1.0f);
  const auto step = [&](const uint16_t* a, const uint16_t* b, uint16_t* o) {
    dtype == Dtype::bf16 ? lerp_bf16(a, b, w, from_base, o) : lerp_f16(a, b, w, from_base, o);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) step(base + i, tuned + i, out + i);
  if (i == n) return;
  uint16_t a[16] = {}, b[16] = {};
  __builtin_memcpy(a, base + i, static_cast<size_t>(n - i) * 2);
  __builtin_memcpy(b, tuned + i, static_cast<size_t>(n - i) * 2);
  step(a, b, a);
  __builtin_memcpy(out + i, a, static_cast<size_t>(n - i) * 2);
}

// float32 sums over at most a few thousand elements, spread over 8 lanes: relative error below 1e-5
void lerp_change(const float* base, const float* out, int64_t n, Change* change) {
  __m256 moved = _mm256_setzero_ps(), size = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 a = _mm256_loadu_ps(base + i), o = _mm256_loadu_ps(out + i), d = _mm256_sub_ps(o, a),
                 zero = _mm256_sub_ps(o, o);
    moved = _mm256_fmadd_ps(d, d, moved);
    size = _mm256_fmadd_ps(a, a, size);
    change->not_finite +=
        __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q))));
  }
  float m[8], s[8];
  _mm256_storeu_ps(m, moved);
  _mm256_storeu_ps(s, size);
  for (int k = 0; k < 8; ++k) change->change_squared += m[k], change->base_squared += s[k];
  for (; i < n; ++i) {
    const float d = out[i] - base[i];
    change->change_squared += d * d;
    change->base_squared += base[i] * base[i];
    change->not_finite += out[i] - out[i] != 0.0f;
  }
}

const LerpKernels lerp = {lerp_f32, lerp_f64, lerp_half, lerp_change};

}  // namespace

extern const Kernels avx2_kernels = {
    .isa = Isa::avx2,
    .matmul_f32 = &matmul_f32,
    .matmul_bf16 = &matmul_bf16,
    .lerp = &lerp,
    .screen = &screen_int<Words, kMr>,
    .select = &select_kernels,
    .loss = &loss_kernels<Floats>,
    .fused_loss = nullptr,
    .to_f32 = to_f32,
    .from_f32 = from_f32,
};

}  // namespace refine_fast
