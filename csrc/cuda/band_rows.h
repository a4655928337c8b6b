// Rows of a matrix in GPU memory, and the float64 sum in which every score is computed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/band_state.h"
#include "kernels/types.h"

namespace refine_fast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

struct Rows {
  const void* data;
  int64_t stride;
  Dtype dtype;
  template <class T>
  __device__ const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
  __device__ float at(int64_t i, int64_t j) const {
    return dtype == Dtype::f32   ? row<float>(i)[j]
           : dtype == Dtype::f16 ? to_float(row<__half>(i)[j])
                                 : to_float(row<__nv_bfloat16>(i)[j]);
  }
};

// SelectKernels::dot's order: lane l sums the i = l (mod 32), then lanes are folded by 8, 16, 4, 2 and 1. Every lane
// gets the sum.
__device__ inline double fold(double sum) {
  for (int step : {8, 16, 4, 2, 1}) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

}  // namespace refine_fast
