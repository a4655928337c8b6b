// The part of the CUDA runtime and of its device functions that csrc/cuda uses, on the emulated machine.
#pragma once
#include <cfenv>
#include <climits>
#include <cmath>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- host ----------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct EmulatedStream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorLaunchFailure ? emulated::failure.c_str()
         : status == cudaSuccess          ? "no error"
                                          : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated::device.processors : emulated::device.shared_bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulated::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  if (blockDim.x == 0 || blockDim.x % emulated::kWarp != 0 || blockDim.x > emulated::kMaxThreads || gridDim.x == 0 ||
      blockDim.y * blockDim.z * gridDim.y * gridDim.z != 1 ||
      config->dynamicSmemBytes > static_cast<size_t>(emulated::device.shared_bytes))
    return cudaErrorInvalidValue;
  const bool done = emulated::machine.run(
      gridDim.x, blockDim.x, config->dynamicSmemBytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
      [](int block, int thread) {
        blockIdx = dim3(static_cast<unsigned>(block)), threadIdx = dim3(static_cast<unsigned>(thread));
      });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

// --- threads together ----------------------------------------------------------------------------

inline void __syncthreads() { emulated::machine.barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  struct In {
    T value;
    int lane_mask;
  } in = {value, lane_mask};
  if (mask != 0xffffffffu) emulated::machine.fail("a shuffle of a part of a warp");
  T out;
  emulated::machine.together(&in, &out, [](const void* const* ins, void* const* outs) {
    for (int lane = 0; lane < emulated::kWarp; ++lane)
      *static_cast<T*>(outs[lane]) =
          static_cast<const In*>(ins[lane ^ static_cast<const In*>(ins[lane])->lane_mask])->value;
  });
  return out;
}

template <class T, class U>
T atomicAdd(T* at, U x) {
  return std::exchange(*at, *at + static_cast<T>(x));
}
template <class T, class U>
T atomicMax(T* at, U x) {
  return std::exchange(*at, std::max(*at, static_cast<T>(x)));
}
template <class T, class U>
T atomicMin(T* at, U x) {
  return std::exchange(*at, std::min(*at, static_cast<T>(x)));
}

// --- arithmetic ----------------------------------------------------------------------------------

namespace emulated {
// volatile keeps the operation between the changes of mode, of which the compiler does not know
template <int kMode, class T, class Compute>
float rounded(T x, T y, Compute compute) {
  volatile T first = x, second = y;
  const int before = std::fegetround();
  std::fesetround(kMode);
  volatile float result = compute(T{first}, T{second});
  std::fesetround(before);
  return result;
}
}  // namespace emulated

inline float __fadd_ru(float x, float y) {
  return emulated::rounded<FE_UPWARD>(x, y, [](float a, float b) { return a + b; });
}
inline float __fmul_ru(float x, float y) {
  return emulated::rounded<FE_UPWARD>(x, y, [](float a, float b) { return a * b; });
}
inline float __fmul_rd(float x, float y) {
  return emulated::rounded<FE_DOWNWARD>(x, y, [](float a, float b) { return a * b; });
}
inline float __fsub_rd(float x, float y) {
  return emulated::rounded<FE_DOWNWARD>(x, y, [](float a, float b) { return a - b; });
}
inline float __double2float_ru(double x) {
  return emulated::rounded<FE_UPWARD>(x, 0.0, [](double a, double) { return static_cast<float>(a); });
}
inline float __double2float_rd(double x) {
  return emulated::rounded<FE_DOWNWARD>(x, 0.0, [](double a, double) { return static_cast<float>(a); });
}
inline float __fsub_rn(float x, float y) { return x - y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __float_as_int(float x) {
  int bits;
  return std::memcpy(&bits, &x, 4), bits;
}
inline float __int_as_float(int bits) {
  float x;
  return std::memcpy(&x, &bits, 4), x;
}
using std::isfinite;
using std::max;
using std::min;
