// The table of kernels that each ISA level fills in (csrc/isa/<level>.cc) and that the algorithms in csrc/core are written over.
// A level leaves a pointer null where the level below serves as well; cpu.cc fills the gaps, so a caller never sees a null.
// Plain function pointers and PODs: a new level is one file, and a test can force any level that the CPU has.
#pragma once
#include "kernels/types.h"

namespace refine_fast {

// C[mr x nr] (+)= A[mr x k] B[k x nr]: the one product behind info_nce. Operands are packed once into panels (zero-padded to
// mr, nr and kr) and used tile after tile from cache; the layout of a panel is the level's own business.
//   f32: operands kept as float32, float32 accumulation.     bf16: operands rounded to bf16 (nearest even), float32 accumulation.
struct MatmulKernels {
  int32_t mr, nr, kr;         // tile rows, tile columns, granularity of k
  int32_t element_bytes;      // of a packed operand: 4 or 2. A panel of A takes round_up(k, kr) * mr * element_bytes bytes, 64-byte aligned
  // `rows` <= mr rows (columns of B for pack_b) of a float matrix with strides in elements, both free: a transposed operand is packed in place
  void (*pack_a)(const float* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, void* panel);
  void (*pack_b)(const float* src, int64_t col_stride, int64_t k_stride, int64_t cols, int64_t k, void* panel);
  // the whole mr x nr tile is written, row stride ldc; k as given to the packers
  void (*tile)(const void* a, const void* b, int64_t k, float* c, int64_t ldc, bool accumulate);
  // pack_b of a bf16 matrix as it lies there; null where panels hold float32, which a caller converts to first
  void (*pack_b_bf16)(const uint16_t* src, int64_t col_stride, int64_t k_stride, int64_t cols, int64_t k, void* panel);
  // State of the calling thread that `tile` needs, from the first tile of a task to its last (core/tile_scope.h); null where it needs none.
  void (*begin_tiles)() = nullptr;
  void (*end_tiles)() = nullptr;
};

// out = base + weight * (tuned - base); see core/lerp.h
struct LerpKernels;
// the product of rounded rows whose error is known; see kernels/screen_kernels.h
struct ScreenKernels;
// threshold-and-append over a row of scores, float64 rescoring; see kernels/select_kernels.h
struct SelectKernels;
// exp, row sums and the weights of a row of scores; see kernels/loss_kernels.h
struct LossKernels;

struct Kernels {
  Isa isa;
  const MatmulKernels* matmul_f32;
  const MatmulKernels* matmul_bf16;
  const LerpKernels* lerp;
  const ScreenKernels* screen;
  const SelectKernels* select;
  const LossKernels* loss;
  // float32 <-> the storage types, round to nearest even, denormals kept
  void (*to_f32)(const void* src, Dtype dtype, int64_t n, float* dst);
  void (*from_f32)(const float* src, Dtype dtype, int64_t n, void* dst);
};

// One per file in csrc/isa.
extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
extern const Kernels neon_kernels;

}  // namespace refine_fast
