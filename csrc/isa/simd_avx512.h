// Vectors of 16 floats or words for the kernels that are written once for all levels (isa/loss_simd.h,
// isa/screen_int.h).
#pragma once
#include <immintrin.h>

#include "isa/pack_avx512.h"

namespace refine_fast {
namespace {

struct Floats {
  using Float = __m512;
  static constexpr int width = 16;
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }  // n <= 0: zeros
  static void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
  static __m512 set(float x) { return _mm512_set1_ps(x); }
  static __m512 add(__m512 x, __m512 y) { return _mm512_add_ps(x, y); }
  static __m512 sub(__m512 x, __m512 y) { return _mm512_sub_ps(x, y); }
  static __m512 mul(__m512 x, __m512 y) { return _mm512_mul_ps(x, y); }
  static __m512 fma(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
  static __m512 max(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }  // y if either is NaN
  static __m512 round(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m512 exp2_integer(__m512 n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static __mmask16 below(__m512 x, __m512 y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
  static __mmask16 equal(const int32_t* ids, int32_t id) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(ids), _mm512_set1_epi32(id));
  }
  static __m512 where(__mmask16 mask, __m512 x, __m512 y) { return _mm512_mask_blend_ps(mask, y, x); }
  static float total(__m512 x) { return _mm512_reduce_add_ps(x); }
  static float largest(__m512 x) { return _mm512_reduce_max_ps(x); }
};

// 16 words of two 16-bit integers
struct Words : Floats {
  using Word = __m512i;
  static constexpr int packed = 2, largest_integer = 32766;  // below 32767, since the scale is rounded to float
  using Sum = __v16si;  // not __m512i: gcc 12 would keep a copy of each sum in both types
  static __m512i zero() { return _mm512_setzero_si512(); }
  static __m512i broadcast(int32_t pair) { return _mm512_set1_epi32(pair); }
  static __m512i load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(int32_t* p, __m512i x, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), x); }
  static __m512i round_to_word(__m512 x) { return _mm512_cvtps_epi32(x); }
  static __m512 to_float(__m512i x) { return _mm512_cvtepi32_ps(x); }
  static __m512 to_float(Sum x) { return _mm512_cvtepi32_ps((__m512i)x); }
  static __m512i join(const __m512i n[2]) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, n[0], _mm512_slli_epi32(n[1], 16));
  }
  static Sum dot(Sum sum, __m512i x, __m512i y) { return sum + (Sum)_mm512_madd_epi16(x, y); }
  static void transpose(__m512i rows[16]) { transpose16(rows); }
};

}  // namespace
}  // namespace refine_fast
