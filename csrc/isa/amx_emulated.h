// The AMX tile intrinsics in plain C, so that amx.cc runs in tests on any AVX-512 CPU (cmake
// -DREFINE_FAST_EMULATE_AMX=ON). Semantics as in Intel's SDM, volume 2, for full tiles of 16 rows x 64 bytes.
// Using tiles that are not configured traps, as it does on the CPU.
#pragma once
#include <immintrin.h>

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

// The products of the even and of the odd k are summed apart, from zero; then their sum is added to C. Each step rounds
// once, and denormals are zeros: so does AVX-512 with the two flags set. No MXCSR of the caller matters to the CPU's
// tiles.
inline void emulated_dpbf16ps(int sum, int a, int b) {
  EmulatedTile &c = emulated_tile(sum), &x = emulated_tile(a), &y = emulated_tile(b);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9fc0);             // round to nearest, no exceptions, denormals are zeros
  asm volatile("" ::: "memory");  // the sums stay between the two modes
  const __m512i upper = _mm512_set1_epi32(~0xffff);
  for (int i = 0; i < 16; ++i) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int p = 0; p < 16; ++p) {
      const __m512i u = _mm512_set1_epi32(static_cast<int>(x.word[i][p])), v = _mm512_loadu_si512(y.word[p]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(u, upper)),
                            _mm512_castsi512_ps(_mm512_and_si512(v, upper)), odd);
    }
    _mm512_storeu_ps(c.word[i], _mm512_add_ps(_mm512_loadu_ps(c.word[i]), _mm512_add_ps(even, odd)));
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(mode);
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
