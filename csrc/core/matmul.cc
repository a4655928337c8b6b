#include "core/matmul.h"

#include <algorithm>

#include "core/tile_scope.h"

namespace refine_fast {
namespace {

// For float32 operands: the steps of k after which a tile's sums are added to C and restart at zero. The error of a sum
// grows with the length of its chain: k = 384 in one piece had up to 1.5 times the error of torch's product. Costs at
// most 4% of info_nce's time (one Zen 5 core). In pieces of bf16 a step is 6 roundings for 32 of k, so that k = 384 in
// one piece has half of the error of torch's product.
constexpr int64_t kDepth = 64, kDepthOfPieces = 384;

void multiply(const MatmulKernels& kernels, const char* a, const char* b, int64_t rows, int64_t cols, int64_t k,
              float* c, int64_t ldc, bool accumulate) {
  const int64_t mr = kernels.mr, nr = kernels.nr, step_a = panel_bytes(kernels, mr, k),
                step_b = panel_bytes(kernels, nr, k);
  alignas(64) float edge[64 * 64];  // no level has a larger tile
  std::fill_n(edge, mr * nr, 0.0f);
  const int64_t bytes = kernels.element_bytes, depth = bytes == 4 ? kDepth : bytes == 6 ? kDepthOfPieces : k;
  const auto product = [&](const char* panel, float* out, int64_t stride, bool add) {
    int64_t p = 0;
    do {  // at least once: if k is 0, C is 0
      kernels.tile(panel + p * mr * bytes, b + p * nr * bytes, std::min(depth, k - p), out, stride, add || p > 0);
    } while ((p += depth) < k);
  };
  for (int64_t j = 0; j < cols; j += nr, b += step_b) {
    const char* panel = a;
    for (int64_t i = 0; i < rows; i += mr, panel += step_a) {
      float* out = c + i * ldc + j;
      if (i + mr <= rows && j + nr <= cols) {
        product(panel, out, ldc, accumulate);
        continue;
      }
      const int64_t height = std::min(mr, rows - i), width = std::min(nr, cols - j);
      for (int64_t r = 0; r < height && accumulate; ++r) std::copy_n(out + r * ldc, width, edge + r * nr);
      product(panel, edge, nr, accumulate);
      for (int64_t r = 0; r < height; ++r) std::copy_n(edge + r * nr, width, out + r * ldc);
    }
  }
}

}  // namespace

void pack_a(const MatmulKernels& kernels, const float* src, int64_t row_stride, int64_t k_stride, int64_t rows,
            int64_t k, char* out) {
  for (int64_t r = 0; r < rows; r += kernels.mr, out += panel_bytes(kernels, kernels.mr, k))
    kernels.pack_a(src + r * row_stride, row_stride, k_stride, std::min<int64_t>(kernels.mr, rows - r), k, out);
}

void pack_b(const MatmulKernels& kernels, const float* src, int64_t col_stride, int64_t k_stride, int64_t cols,
            int64_t k, char* out) {
  for (int64_t c = 0; c < cols; c += kernels.nr, out += panel_bytes(kernels, kernels.nr, k))
    kernels.pack_b(src + c * col_stride, col_stride, k_stride, std::min<int64_t>(kernels.nr, cols - c), k, out);
}

// An element has the same value wherever it lies in C, at an edge or inside: info_nce compares scores that must tie.
// B's panel is the outer loop: it stays in L2 (32 columns x 768 floats: 96 KiB) while A's panels stream past it. Where
// they would not come from L2 again for the next panel of B, rows_at_once bounds how many pass.
void matmul(const MatmulKernels& kernels, const char* a, const char* b, int64_t rows, int64_t cols, int64_t k, float* c,
            int64_t ldc, bool accumulate) {
  const TileScope scope(kernels);
  const int64_t at_once = kernels.rows_at_once > 0 ? kernels.rows_at_once : std::max<int64_t>(rows, 1);
  for (int64_t r = 0; r < rows; r += at_once)
    multiply(kernels, a + r / kernels.mr * panel_bytes(kernels, kernels.mr, k), b, std::min(at_once, rows - r), cols, k,
             c + r * ldc, ldc, accumulate);
}

}  // namespace refine_fast
