// The tiles of the AMX level: 8 of 16 rows x 64 bytes.
//     instruction   work           cycles
//     TDPBF16PS     16 x 16 x 32     16
#pragma once
#include <immintrin.h>

#include "isa/pack_avx512.h"
#if defined(REFINE_FAST_EMULATE_AMX)
#include "isa/amx_emulated.h"
#endif

namespace refine_fast {
namespace {

// 32 x 32 floats in tiles 0-3, A in 4-5, B in 6-7. 4 loads feed 4 TDPBF16PS, the best ratio that 8 tiles allow.
// Panel of A: for every 32 of k, 32 rows of 32 bf16 (64 bytes). Panel of B: words of two neighbours along k, 32 columns
// a line.

constexpr int kMr = 32, kNr = 32, kKr = 32;
constexpr int kStepBytes = kMr * kKr * 2;  // of either panel, for 32 of k

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

void pack_a(const float* src, int64_t stride, int64_t k_stride, int64_t rows, int64_t k, void* panel) {
  int32_t* out = static_cast<int32_t*>(panel);
  for (int64_t p = 0; p < k; p += kKr, out += kMr * kKr / 2)
    for (int64_t r = 0; r < kMr; r += 16) {
      const float* s = src + p * k_stride + r * stride;
      __m512i words[16];
      if (k_stride == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          words[i] = r + i < rows ? row_words(s + i * stride, k - p) : _mm512_setzero_si512();
      } else {
        pack_words_bf16(s, stride, k_stride, rows - r, k - p, 16, 16, 16, reinterpret_cast<int32_t*>(words));
        transpose16(words);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (r + i) * 16, words[i]);
    }
}

// Once a task: another library of this thread (oneDNN) may have configured the tiles differently since the last one.
// Released at its end, or every context switch of the thread would save 8 KiB of tiles.
void begin_tiles() { _tile_loadconfig(&kConfig); }
void end_tiles() { _tile_release(); }

// --- 32 x 32 sums in tiles 0-3 --------------------------------------------------------------------

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_tiles(const float* c, int64_t ldc) {
  _tile_loadd(0, c, ldc * 4);
  _tile_loadd(1, c + 16, ldc * 4);
  _tile_loadd(2, c + 16 * ldc, ldc * 4);
  _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
}

inline void store_tiles(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// gcc 12 lets a store of a vector and a load of a tile pass each other.
inline void fence() { asm volatile("" ::: "memory"); }

// The operand that passes by, and need not stay in L1.
enum class Streaming { none, a, b };

// Adds the products of 32 of k. `work` runs between them.
template <Streaming kStreaming, class Work>
inline void step(const char* a, const char* b, const Work& work) {
  if constexpr (kStreaming == Streaming::a)
    _tile_stream_loadd(4, a, 64);
  else
    _tile_loadd(4, a, 64);
  if constexpr (kStreaming == Streaming::b)
    _tile_stream_loadd(6, b, 128);
  else
    _tile_loadd(6, b, 128);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kStreaming == Streaming::b)
    _tile_stream_loadd(7, b + 64, 128);
  else
    _tile_loadd(7, b + 64, 128);
  _tile_dpbf16ps(1, 4, 7);
  work();
  if constexpr (kStreaming == Streaming::a)
    _tile_stream_loadd(5, a + 1024, 64);
  else
    _tile_loadd(5, a + 1024, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

void tile(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate) {
  const char *pa = static_cast<const char*>(a), *pb = static_cast<const char*>(b);
  if (accumulate)
    load_tiles(c, ldc);
  else
    zero_tiles();
  for (int64_t p = 0; p < k; p += kKr, pa += kStepBytes, pb += kStepBytes) step<Streaming::none>(pa, pb, [] {});
  store_tiles(c, ldc);
}

}  // namespace
}  // namespace refine_fast
