// The table of kernels that each ISA level fills in (csrc/isa/<level>.cc). The algorithms in csrc/core call the kernels
// only through it. A level leaves a pointer null if the level below does the job; core/cpu.cc fills the gaps, so a
// caller never sees null but for fused_loss. Plain function pointers and PODs: a new level is one file, and a test can
// force any level that the CPU has.
#pragma once
#include "kernels/types.h"

namespace refine_fast {

// C[mr x nr] (+)= A[mr x k] B[k x nr]: the matrix product behind info_nce. Operands are packed once into panels,
// zero-padded to mr, nr and kr, and then used tile after tile from cache. Each level chooses the layout of its panels.
//   f32    operands in float32, float32 accumulation
//   bf16   operands rounded to bf16 (nearest even), float32 accumulation
struct MatmulKernels {
  int32_t mr, nr, kr;  // tile rows, tile columns, granularity of k
  // Of a packed operand: 4, 2, or 6 for a float32 in three pieces. A panel of A takes round_up(k, kr) * mr *
  // element_bytes bytes, 64-byte aligned.
  int32_t element_bytes;
  // Packs `rows` <= mr rows of A (`cols` <= nr columns of B). Strides are in elements and arbitrary, so a transposed
  // operand needs no copy.
  void (*pack_a)(const float* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, void* panel);
  void (*pack_b)(const float* src, int64_t col_stride, int64_t k_stride, int64_t cols, int64_t k, void* panel);
  // Writes the whole mr x nr tile, row stride ldc; k as given to the packers.
  void (*tile)(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate);
  // pack_b from bf16 in memory; null if panels hold float32: the caller converts first.
  void (*pack_b_bf16)(const uint16_t* src, int64_t col_stride, int64_t k_stride, int64_t cols, int64_t k,
                      void* panel) = nullptr;
  // State of the calling thread that `tile` needs, from the first tile of a task to its last (core/tile_scope.h); null
  // where it needs none.
  void (*begin_tiles)() = nullptr;
  void (*end_tiles)() = nullptr;
  // As many rows of A meet all of B before the next rows do (core/matmul.cc): those that L2 holds beside B. 0: all.
  int32_t rows_at_once = 0;
};

// out = base + weight * (tuned - base); see core/lerp.h
struct LerpKernels;
// the product of rounded rows whose error is known; see kernels/screen_kernels.h
struct ScreenKernels;
// threshold-and-append over a row of scores, float64 rescoring; see kernels/select_kernels.h
struct SelectKernels;
// exp, row sums and the weights of a row of scores; see kernels/loss_kernels.h
struct LossKernels;
// info_nce without stored scores; see kernels/fused_loss_kernels.h. Null where no level has it: not every machine does.
struct FusedLossKernels;

struct Kernels {
  Isa isa;
  const MatmulKernels* matmul_f32;
  const MatmulKernels* matmul_bf16;
  const LerpKernels* lerp;
  const ScreenKernels* screen;
  const SelectKernels* select;
  const LossKernels* loss;
  const FusedLossKernels* fused_loss;
  // float32 <-> the storage types; rounds to nearest even and keeps denormals
  void (*to_f32)(const void* src, Dtype dtype, int64_t n, float* dst);
  void (*from_f32)(const float* src, Dtype dtype, int64_t n, void* dst);
  // matmul_f32 for operands that are finite, where that can be faster; other results are NaN. Those below 2^-100 may
  // lose digits.
  const MatmulKernels* matmul_finite_f32 = nullptr;
};

// One per file in csrc/isa.
extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
extern const Kernels neon_kernels;

}  // namespace refine_fast
