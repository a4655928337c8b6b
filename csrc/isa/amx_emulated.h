// The AMX tile intrinsics in plain C, so that amx.cc runs in tests on any AVX-512 CPU (cmake
// -DREFINE_FAST_EMULATE_AMX=ON). Semantics as in Intel's SDM, volume 2, for full tiles of 16 rows x 64 bytes.
// Using tiles that are not configured traps, as it does on the CPU.
#pragma once
#include <cstdint>

namespace refine_fast {
namespace {

struct EmulatedTile {
  uint32_t word[16][16];
};
thread_local EmulatedTile emulated_tiles[8];
thread_local bool emulated_configured = false;

inline void emulated_configure(bool configured) {
  emulated_configured = configured;
  for (EmulatedTile& tile : emulated_tiles) tile = {};
}

inline EmulatedTile& emulated_tile(int i) {
  if (!emulated_configured) __builtin_trap();
  return emulated_tiles[i];
}

inline void emulated_loadd(int tile, const void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(emulated_tile(tile).word[i], static_cast<const char*>(base) + i * stride, 64);
}

inline void emulated_stored(int tile, void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char*>(base) + i * stride, emulated_tile(tile).word[i], 64);
}

inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// The upper half of a float, which is a bf16; the lower if it is shifted there.
inline float emulated_bf16(uint32_t word) {
  float x;
  word &= 0xffff0000u;
  __builtin_memcpy(&x, &word, 4);
  return flushed(x);
}

// The products of the even and of the odd k are summed apart, from zero; then their sum is added to C. Each step rounds
// once, and denormals are zeros.
inline void emulated_dpbf16ps(int sum, int a, int b) {
  EmulatedTile &c = emulated_tile(sum), &x = emulated_tile(a), &y = emulated_tile(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float even = 0, odd = 0, old;
      for (int p = 0; p < 16; ++p) {
        const uint32_t u = x.word[i][p], v = y.word[p][j];
        even = flushed(__builtin_fmaf(emulated_bf16(u << 16), emulated_bf16(v << 16), even));
        odd = flushed(__builtin_fmaf(emulated_bf16(u), emulated_bf16(v), odd));
      }
      __builtin_memcpy(&old, &c.word[i][j], 4);
      old = flushed(flushed(old) + flushed(even + odd));
      __builtin_memcpy(&c.word[i][j], &old, 4);
    }
}

}  // namespace
}  // namespace refine_fast

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_release
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (static_cast<void>(config), emulated_configure(true))
#define _tile_release() emulated_configure(false)
#define _tile_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_stored(tile, base, stride)
#define _tile_zero(tile) (emulated_tile(tile) = {})
#define _tile_dpbf16ps(sum, a, b) emulated_dpbf16ps(sum, a, b)
