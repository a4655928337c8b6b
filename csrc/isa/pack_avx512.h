// Packing for the AVX-512 levels: 32-bit words (a float, or two neighbouring bf16) of up to 16 rows, interleaved row by
// row. A source with rows along k is transposed 16 x 16 in registers, at 64 shuffles for 256 words; one with rows side
// by side is copied.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace refine_fast {
namespace {

// rows[i] word j -> rows[j] word i: 64 shuffles for 256 words
inline void transpose16(__m512i rows[16]) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // u[i + 4 b]: rows 4b..4b+3; words i, i + 4, i + 8, i + 12
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88),
                  d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(a, c, 0x88), rows[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), rows[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u); }

// n <= 16 floats, 0 beyond; a stride other than 1 gathers
inline __m512 load_floats(const float* src, int64_t stride, int64_t n) {
  if (stride == 1) return _mm512_maskz_loadu_ps(first(n), src);
  alignas(64) float buffer[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) buffer[i] = src[i * stride];
  return _mm512_load_ps(buffer);
}

// out[p * pitch + r] = src[r * stride + p * k_stride] for r < width (0 for r >= rows) and p < k
inline void pack_words_f32(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, int64_t width,
                           int64_t pitch, float* out) {
  const __mmask16 keep = first(width);
  if (k_stride != 1) {
    for (int64_t p = 0; p < k; ++p)
      _mm512_mask_storeu_ps(out + p * pitch, keep, load_floats(src + p * k_stride, stride, rows));
    return;
  }
  for (int64_t p = 0; p < k; p += 16) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = i < rows ? _mm512_castps_si512(load_floats(src + i * stride + p, 1, k - p)) : _mm512_setzero_si512();
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (p + i < k) _mm512_mask_storeu_epi32(out + (p + i) * pitch, keep, r[i]);
  }
}

// A panel of float32 words, k-major, up to 32 rows a step. kRound: rounded to bf16 (nearest even) but kept as float32.
template <int kWidth, bool kRound>
inline void pack_panel_f32(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  float* out = static_cast<float*>(panel);
  for (int64_t r = 0; r < kWidth; r += 16)
    pack_words_f32(src + r * stride, stride, k_stride, rows - r, k, kWidth - r < 16 ? kWidth - r : 16, kWidth, out + r);
  if (!kRound) return;
  for (int64_t i = 0; i < kWidth * k; i += 16) {
    const __mmask16 keep = first(kWidth * k - i);
    const __m512i x = _mm512_maskz_loadu_epi32(keep, out + i);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan =
        _mm512_cmpgt_epu32_mask(_mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
    const __m512i bf16 = _mm512_and_si512(_mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000)),
                                          _mm512_set1_epi32(~0xffff));
    _mm512_mask_storeu_epi32(out + i, keep, bf16);
  }
}

#if defined(__AVX512BF16__)
// [odd:even] bf16 of 16 floats each, one pair to a word
inline __m512i pair_words(__m512 even, __m512 odd) {
  const __m512i e = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)),
                o = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
}

// 32 floats along k of one row as 16 words
inline __m512i row_words(const float* src, int64_t n) {
  return (__m512i)_mm512_cvtne2ps_pbh(load_floats(src + 16, 1, n - 16), load_floats(src, 1, n));
}

// out[p * pitch + r] = the bf16 pair (2p, 2p + 1) of row r, for p < pairs; 0 beyond rows and beyond k
inline void pack_words_bf16(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, int64_t pairs,
                            int64_t width, int64_t pitch, int32_t* out) {
  const __mmask16 keep = first(width);
  if (k_stride != 1) {
    for (int64_t p = 0; p < pairs; ++p) {
      const float* s = src + 2 * p * k_stride;
      const __m512 even = load_floats(s, stride, 2 * p < k ? rows : 0),
                   odd = load_floats(s + k_stride, stride, 2 * p + 1 < k ? rows : 0);
      _mm512_mask_storeu_epi32(out + p * pitch, keep, pair_words(even, odd));
    }
    return;
  }
  for (int64_t p = 0; p < pairs; p += 16) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = i < rows ? row_words(src + i * stride + 2 * p, k - 2 * p) : _mm512_setzero_si512();
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (p + i < pairs) _mm512_mask_storeu_epi32(out + (p + i) * pitch, keep, r[i]);
  }
}

template <int kWidth, int kGranularity>
inline void pack_panel_bf16(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  int32_t* out = static_cast<int32_t*>(panel);
  const int64_t pairs = (k + kGranularity - 1) / kGranularity * (kGranularity / 2);
  for (int64_t r = 0; r < kWidth; r += 16)
    pack_words_bf16(src + r * stride, stride, k_stride, rows - r, k, pairs, kWidth - r < 16 ? kWidth - r : 16, kWidth,
                    out + r);
}

// n <= 16 bf16 as the low halves of words, 0 beyond
inline __m512i load_halves(const uint16_t* src, int64_t stride, int64_t n) {
  if (stride == 1) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), src));
  alignas(64) int32_t buffer[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) buffer[i] = src[i * stride];
  return _mm512_load_si512(buffer);
}

// pack_panel_bf16 for a bf16 source: rows along k already hold the panel's words
template <int kWidth, int kGranularity>
inline void pack_panel_words(const uint16_t* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k,
                             void* panel) {
  int32_t* out = static_cast<int32_t*>(panel);
  const int64_t pairs = (k + kGranularity - 1) / kGranularity * (kGranularity / 2);
  for (int64_t r = 0; r < kWidth; r += 16) {
    const uint16_t* s = src + r * stride;
    const __mmask16 keep = first(kWidth - r);
    for (int64_t p = 0; p < pairs; p += k_stride == 1 ? 16 : 1) {
      if (k_stride != 1) {
        const __m512i even = load_halves(s + 2 * p * k_stride, stride, 2 * p < k ? rows - r : 0);
        const __m512i odd = load_halves(s + (2 * p + 1) * k_stride, stride, 2 * p + 1 < k ? rows - r : 0);
        _mm512_mask_storeu_epi32(out + p * kWidth + r, keep, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        continue;
      }
      const int64_t left = k - 2 * p;
      const __mmask32 within = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        words[i] = r + i < rows ? _mm512_maskz_loadu_epi16(within, s + i * stride + 2 * p) : _mm512_setzero_si512();
      transpose16(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (p + i < pairs) _mm512_mask_storeu_epi32(out + (p + i) * kWidth + r, keep, words[i]);
    }
  }
}
#endif

}  // namespace
}  // namespace refine_fast
