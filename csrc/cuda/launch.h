// A kernel launch as a function call with a status.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define REFINE_FAST_TRY(call) \
  if (const cudaError_t status_ = (call); status_ != cudaSuccess) return status_

namespace refine_fast {

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, void* stream,
                   Parameters... parameters) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = static_cast<cudaStream_t>(stream);
  if (shared_bytes > 0)
    REFINE_FAST_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace refine_fast
