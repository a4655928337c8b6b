// The update of a LoRA adapter, B A, a tile of rows at a time: the product is never held as a whole.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/cpu.h"
#include "core/matmul.h"
#include "core/memory.h"
#include "core/numeric.h"
#include "core/tile_scope.h"

namespace refine_fast {

// tuned = base + B A, B (rows, rank), A (rank, cols), float32: an adapter's update, its scale already in B
struct LowRankFactors {
  const float* a;
  const float* b;
  int64_t rank, rows, cols;
};

class LowRankRows {
 public:
  void open(const LowRankFactors& factors) {
    f_ = factors, row_ = -1;
    stride_ = round_up(f_.cols, k_.nr);
    a_ = PageBuffer(bytes_b(k_, f_.cols, f_.rank));
    b_ = PageBuffer(panel_bytes(k_, k_.mr, f_.rank));
    rows_ = PageBuffer(k_.mr * stride_ * 4);
    pack_b(k_, f_.a, 1, f_.cols, f_.cols, f_.rank, a_.data());
  }

  // sum[i] += (B A)[element + i]
  template <class Float>
  void add(int64_t element, int64_t n, Float* sum) {
    while (n > 0) {
      const int64_t row = element / f_.cols, col = element % f_.cols, m = std::min(n, f_.cols - col);
      if (row_ < 0 || row < row_ || row >= row_ + k_.mr) compute(row);
      const float* delta = rows_.floats() + (row - row_) * stride_ + col;
      for (int64_t i = 0; i < m; ++i) sum[i] += delta[i];
      element += m, sum += m, n -= m;
    }
  }

 private:
  // rows `row` .. row + mr of B A
  void compute(int64_t row) {
    row_ = row;
    k_.pack_a(f_.b + row * f_.rank, f_.rank, 1, std::min<int64_t>(k_.mr, f_.rows - row), f_.rank, b_.data());
    const TileScope scope(k_);
    for (int64_t c = 0; c < stride_; c += k_.nr)
      k_.tile(b_.data(), a_.data() + c / k_.nr * panel_bytes(k_, k_.nr, f_.rank), f_.rank, rows_.floats() + c, stride_,
              false);
  }

  const MatmulKernels& k_ = *kernels().matmul_f32;
  LowRankFactors f_{};
  PageBuffer a_, b_, rows_;
  int64_t stride_ = 0, row_ = -1;
};

}  // namespace refine_fast
