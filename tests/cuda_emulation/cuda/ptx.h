// csrc/cuda/ptx.h in plain C++, as the PTX ISA defines it (sections on ldmatrix, on cp.async and on the fragments of
// mma.m16n8k16).
#pragma once
#include <bit>

#include "cuda_runtime.h"

namespace refine_fast {

inline unsigned char* shared_memory() { return emulated::machine.shared(); }

inline void copy_async(void* shared, const void* global) { emulated::machine.copy_async(shared, global); }
inline void copy_async_commit() { emulated::machine.copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  emulated::machine.copy_async_wait(kPending);
}

// ldmatrix.x4: "threads 0-7 give the rows of the first matrix, 8-15 of the second, ..."; thread i receives, of each,
// row i / 4, elements 2 (i % 4) and 2 (i % 4) + 1, the first in the lower half of the register.
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  emulated::machine.check_shared(row, 16);
  emulated::machine.together(row, out, [](const void* const* rows, void* const* outs) {
    for (int lane = 0; lane < emulated::kWarp; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(static_cast<uint32_t*>(outs[lane]) + matrix,
                    static_cast<const uint32_t*>(rows[matrix * 8 + lane / 4]) + lane % 4, 4);
  });
}

// The value of a half; NaN also for infinity, which no operand may hold.
inline double value_of_half(uint16_t bits) {
  const float size = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;  // denormals come out right
  return (bits & 0x7c00) == 0x7c00 ? NAN : bits & 0x8000 ? -size : size;
}

// mma.m16n8k16: with group = lane / 4 and t = lane % 4,
//   A  a_i (i = 0..7, two a register)  row group if i in {0, 1, 4, 5}, else group + 8  column 2 t + i % 2, + 8 if i > 3
//   B  b_i (i = 0..3)                  row 2 t + i % 2, + 8 if i > 1                   column group
//   C  c_i (i = 0..3)                  row group, + 8 if i > 1                         column 2 t + i % 2
// Every partial sum is truncated to float32, not rounded: tensor cores guarantee no more, and the screen's margin has
// to cover it.
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
    float* c;
  } in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, c};
  emulated::machine.together(&in, nullptr, [](const void* const* ins, void* const*) {
    uint16_t a_bits[16][16], b_bits[16][8];
    double a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < emulated::kWarp; ++lane) {
      const In& in = *static_cast<const In*>(ins[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i)
        a_bits[group + (i == 0 || i == 1 || i == 4 || i == 5 ? 0 : 8)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] =
            static_cast<uint16_t>(in.a[i / 2] >> i % 2 * 16);
      for (int i = 0; i < 4; ++i)
        b_bits[2 * t + i % 2 + (i >= 2 ? 8 : 0)][group] = static_cast<uint16_t>(in.b[i / 2] >> i % 2 * 16);
      for (int i = 0; i < 4; ++i) c[group + (i >= 2 ? 8 : 0)][2 * t + i % 2] = static_cast<double>(in.c[i]);
    }
    for (int i = 0; i < 256; ++i) a[i / 16][i % 16] = value_of_half(a_bits[i / 16][i % 16]);
    for (int i = 0; i < 128; ++i) b[i / 8][i % 8] = value_of_half(b_bits[i / 8][i % 8]);
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column)  // 53 bits to 24
          c[row][column] = std::bit_cast<double>(std::bit_cast<uint64_t>(c[row][column] + a[row][k] * b[k][column]) &
                                                 ~uint64_t{0x1fffffff});
    for (int lane = 0; lane < emulated::kWarp; ++lane) {
      const In& in = *static_cast<const In*>(ins[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) in.c[i] = static_cast<float>(c[group + (i >= 2 ? 8 : 0)][2 * t + i % 2]);
    }
  });
}

}  // namespace refine_fast
