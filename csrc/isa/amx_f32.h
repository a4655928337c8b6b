// float32 products on the tiles of the AMX level (isa/amx_tiles.h), which multiply bf16.
//
// The maths. A float32 is the sum of three bf16, x = h + m + l: 24 bits in three times 8. Of the nine products of x y
// the six largest are summed,
//     h h    h m + m h    h l + m m + l h            of size 1, 2^-9, 2^-18
// and m l + l m, at most 2^-24 of x y and of random sign, is dropped with l l. bf16 products are exact in float32. The
// tiles take pieces and sums below 2^-126 for 0: an operand below 2^-100 loses digits.
//
// The accumulator. A TDPBF16PS sums 32 products before it rounds them into a tile: k = 384 costs 72 roundings instead
// of 384. The tile starts at zero and is added to C at the end, in vectors: that is more exact than to load C into it,
// and C need not be there at the start. Root mean square error of the scores of unit rows, width 384: 8e-9, of torch's
// product (MKL) 1.8e-8.
//
// Roofline. TDPBF16PS peaks at 3,370 GFLOP/s a core of a Xeon with AMX, with random operands at
// 2,500-2,850, where the core lowers its clock: 420-475 after six products, against 242 with VFMADD. Each piece of A is
// used with the piece of B that is there, so 14 loads of a tile feed 24 products, and L2 keeps up with both operands.
// Measured, GFLOP/s of one core in one window, k = 192 / 384 / 768: a tile with operands in L2 412 / 440 / 450,
// 640 x 192 results 395 / 365 / 355; in info_nce, where C and A come from L3, about 290 (B = 8,192, width 384).
#pragma once
#include "isa/amx_tiles.h"

namespace refine_fast {
namespace {

// A panel: for every 32 of k, the pieces h, m and l of 32 rows (columns), each 32 lines of 64 bytes. Word i of a line
// pairs k = i with k = i + 16, not two neighbours: the order of k is free as long as A and B agree, and this one needs
// no shuffles. Of A a line is a row; of B line i has word i of 16 columns, columns 16-31 follow in lines 16-31.
constexpr int kPieces = 3, kPieceBytes = kStepBytes, kWideStepBytes = kPieces * kPieceBytes;

// 32 bits rounded to their upper 16, ties away from zero: a float to bf16
inline __m512i upper_half(__m512i x) {
  return _mm512_and_si512(_mm512_add_epi32(x, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(~0xffff));
}

struct Pieces {
  __m512i piece[kPieces];  // each a float whose lower half is 0
};

// Finite floats. Both differences are exact.
inline Pieces split(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), rounded = upper_half(bits);
  const __mmask16 infinite = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(rounded), 0x18);  // the largest floats
  const __m512i h = _mm512_mask_and_epi32(rounded, infinite, bits, _mm512_set1_epi32(~0xffff));
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(h));
  const __m512i m = upper_half(_mm512_castps_si512(rest));
  return {{h, m, _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(m)))}};
}

// A line of each piece; x is the lower half of its words, y the upper.
inline void store_lines(__m512 x, __m512 y, char* out) {
  const Pieces lower = split(x), upper = split(y);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i)
    _mm512_storeu_si512(out + i * kPieceBytes,
                        _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(lower.piece[i], 16), upper.piece[i]));
}

// line i, lane j = src[i * line_stride + j * lane_stride] for i < lines and j < lanes, else 0
inline void load_lines(const float* src, int64_t line_stride, int64_t lane_stride, int64_t lines, int64_t lanes,
                       __m512i line[16]) {
  const bool across = lane_stride != 1 && line_stride == 1;
  const int64_t stride = across ? lane_stride : line_stride, step = across ? 1 : lane_stride;
  const int64_t rows = across ? lanes : lines, n = across ? lines : lanes;
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) line[i] = _mm512_castps_si512(load_floats(src + i * stride, step, i < rows ? n : 0));
  if (across) transpose16(line);
}

// 16 lines of each piece. The upper halves of the words begin at src + upper.
inline void pack_lines(const float* src, int64_t upper, int64_t line_stride, int64_t lane_stride, int64_t lines,
                       int64_t lanes, int64_t upper_lines, int64_t upper_lanes, char* out) {
  __m512i x[16], y[16];
  load_lines(src, line_stride, lane_stride, lines, lanes, x);
  load_lines(src + upper, line_stride, lane_stride, upper_lines, upper_lanes, y);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_lines(_mm512_castsi512_ps(x[i]), _mm512_castsi512_ps(y[i]), out + i * 64);
}

void pack_a_f32(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int64_t p = 0; p < k; p += kKr, out += kWideStepBytes)
    for (int64_t r = 0; r < kMr; r += 16)
      pack_lines(src + r * stride + p * k_stride, 16 * k_stride, stride, k_stride, rows - r, k - p, rows - r,
                 k - p - 16, out + r * 64);
}

void pack_b_f32(const float* src, int64_t stride, int64_t k_stride, int64_t cols, int64_t k, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int64_t p = 0; p < k; p += kKr, out += kWideStepBytes)
    for (int64_t c = 0; c < kNr; c += 16)
      pack_lines(src + c * stride + p * k_stride, 16 * k_stride, k_stride, stride, k - p, cols - c, k - p - 16,
                 cols - c, out + c * 64);
}

// C += A B for the next piece of A, or of B, and the piece of the other in the tiles
inline void multiply_next_a(const char* a) {
  _tile_loadd(4, a, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + 1024, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
inline void multiply_next_b(const char* b) {
  _tile_loadd(6, b, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, b + 1024, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

void tile_f32(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const char *pa = static_cast<const char*>(a), *pb = static_cast<const char*>(b);
  zero_tiles();
  // After 128 products (2,048 cycles) without a multiplication in vectors, storing a tile takes 300 ns instead of 5:
  // some unit has gone to sleep. One multiplication a step keeps it awake.
  __m128i awake = _mm_setzero_si128();
  int64_t line = 0;
  for (int64_t p = 0; p < k; p += kKr, pa += kWideStepBytes, pb += kWideStepBytes) {
    // C comes from L3 meanwhile, a few lines a step: all at once they would take the fill buffers from A and B
    for (; line < kMr && line * k < (p + kKr) * kMr; ++line) {
      __builtin_prefetch(c + line * ldc);
      __builtin_prefetch(c + line * ldc + 16);
    }
    awake = _mm_mullo_epi32(awake, awake);
    asm volatile("" : "+x"(awake));
    _tile_loadd(6, pb, 64);
    _tile_loadd(7, pb + 1024, 64);
    multiply_next_a(pa + 2 * kPieceBytes);  // l h
    multiply_next_a(pa + kPieceBytes);      // m h
    multiply_next_b(pb + kPieceBytes);      // m m
    multiply_next_a(pa);                    // h m
    multiply_next_b(pb + 2 * kPieceBytes);  // h l
    multiply_next_b(pb);                    // h h
  }
  if (!accumulate) return store_tiles(c, ldc);
  alignas(64) float sums[kMr * kNr];
  store_tiles(sums, kNr);
  fence();
#pragma GCC unroll 4
  for (int i = 0; i < kMr; ++i, c += ldc) {
    _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), _mm512_load_ps(sums + i * kNr)));
    _mm512_storeu_ps(c + 16, _mm512_add_ps(_mm512_loadu_ps(c + 16), _mm512_load_ps(sums + i * kNr + 16)));
  }
}

}  // namespace
}  // namespace refine_fast
