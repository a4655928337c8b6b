// AVX-512 with VDPBF16PS and VPDPBUSD: two bf16 products, or four 8-bit integer products, into each of 16 sums.
// Includes only intrinsics and POD headers, and everything is static: a weak symbol compiled here could be merged into
// baseline code.
#include <immintrin.h>

#include "isa/pack_avx512.h"
#include "isa/screen_int.h"
#include "isa/simd_avx512.h"
#include "isa/tile_avx512.h"
#include "kernels/kernels.h"

namespace refine_fast {
namespace {

// --- matmul: the tile of isa/tile_avx512.h over pairs of bf16 ------------------------------------

constexpr int kKr = 2;

struct PairWords {
  using Word = int32_t;
  static __m512bh load(const int32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh broadcast(int32_t pair) { return (__m512bh)_mm512_set1_epi32(pair); }
  static __m512 multiply_add(__m512 sum, __m512bh x, __m512bh y) { return _mm512_dpbf16_ps(sum, x, y); }
};
constexpr auto tile = tile_avx512<PairWords, kKr>;

const MatmulKernels matmul_bf16 = {
    kMr, kNr, kKr, 2, pack_panel_bf16<kMr, kKr>, pack_panel_bf16<kNr, kKr>, tile, pack_panel_words<kNr, kKr>};

// 16 words of four 8-bit integers
struct Bytes : Words {
  static constexpr int packed = 4, largest_integer = 127;
  static __m512i join(const __m512i n[4]) {
    const __m512i low = _mm512_mask_blend_epi8(0x2222222222222222, n[0], _mm512_slli_epi32(n[1], 8));
    const __m512i high =
        _mm512_mask_blend_epi8(0x8888888888888888, _mm512_slli_epi32(n[2], 16), _mm512_slli_epi32(n[3], 24));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
  }
  // x H / 8 for the signed 64 elements x and the Hadamard matrix H of 64
  static void rotate(__m512 x[4]) {
    constexpr uint64_t kSigns = 0x9E3779B97F4A7C15u;
    for (int i = 0; i < 4; ++i) {
      __m512 y = _mm512_mul_ps(x[i], _mm512_set1_ps(0.125f));
      y = _mm512_mask_sub_ps(y, static_cast<__mmask16>(kSigns >> (16 * i)), _mm512_setzero_ps(), y);
      y = sums(y, _mm512_permute_ps(y, 0xb1), 0xaaaa);
      y = sums(y, _mm512_permute_ps(y, 0x4e), 0xcccc);
      y = sums(y, _mm512_shuffle_f32x4(y, y, 0xb1), 0xf0f0);
      x[i] = sums(y, _mm512_shuffle_f32x4(y, y, 0x4e), 0xff00);
    }
    for (int half = 1; half < 4; half *= 2)
      for (int i = 0; i < 4; ++i) {
        if ((i & half) != 0) continue;
        const __m512 a = x[i], b = x[i + half];
        x[i] = _mm512_add_ps(a, b), x[i + half] = _mm512_sub_ps(a, b);
      }
  }
  static __m512 sums(__m512 x, __m512 partner, __mmask16 second) {
    return _mm512_mask_sub_ps(_mm512_add_ps(x, partner), second, partner, x);
  }
  static __m512i add_128(__m512i x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  static Sum dot(Sum sum, __m512i x, __m512i y) { return (Sum)_mm512_dpbusd_epi32((__m512i)sum, x, y); }
};

}  // namespace

extern const Kernels avx512_bf16_kernels = {
    .isa = Isa::avx512_bf16,
    .matmul_f32 = nullptr,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .screen = &screen_int<Bytes, kMr>,
    .select = nullptr,
    .loss = nullptr,
    .fused_loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
