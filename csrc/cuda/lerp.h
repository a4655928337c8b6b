// out = base + weight * (tuned - base) in GPU memory, with the same bits as csrc/core/lerp.h.
#pragma once
#include <cstdint>

#include "kernels/types.h"

// In place: base, with n elements of base_type, becomes the interpolation. Returns a cudaError_t; runs on `stream` (a
// cudaStream_t).
extern "C" int refine_fast_cuda_lerp(void* base, refine_fast::Dtype base_type, const void* tuned,
                                     refine_fast::Dtype tuned_type, int64_t n, double weight, void* stream);

// The text of a status that a function of csrc/cuda returned.
extern "C" const char* refine_fast_cuda_error(int status);
