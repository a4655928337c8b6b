// C (+)= A B for matrices of any size, over the packed panels and tiles of one ISA level (kernels/kernels.h).
#pragma once
#include "core/numeric.h"
#include "kernels/kernels.h"

namespace refine_fast {

// Bytes of one packed panel, of the packed panels of A and of B. Multiples of 64, so that panels that follow one
// another stay aligned.
inline int64_t panel_bytes(const MatmulKernels& kernels, int64_t width, int64_t k) {
  return round_up(round_up(k, kernels.kr) * width * kernels.element_bytes, 64);
}
inline int64_t bytes_a(const MatmulKernels& kernels, int64_t rows, int64_t k) {
  return ceil_div(rows, kernels.mr) * panel_bytes(kernels, kernels.mr, k);
}
inline int64_t bytes_b(const MatmulKernels& kernels, int64_t cols, int64_t k) {
  return ceil_div(cols, kernels.nr) * panel_bytes(kernels, kernels.nr, k);
}

// Pack a matrix panel after panel. Element (row, p) of A is src[row * row_stride + p * k_stride], (p, col) of B src[col
// * col_stride + p * k_stride].
void pack_a(const MatmulKernels& kernels, const float* src, int64_t row_stride, int64_t k_stride, int64_t rows,
            int64_t k, char* out);
void pack_b(const MatmulKernels& kernels, const float* src, int64_t col_stride, int64_t k_stride, int64_t cols,
            int64_t k, char* out);

// C[rows x cols] (+)= A B of packed operands. Nothing else of C is touched.
void matmul(const MatmulKernels& kernels, const char* a, const char* b, int64_t rows, int64_t cols, int64_t k, float* c,
            int64_t ldc, bool accumulate);

}  // namespace refine_fast
