// base == tuned ? base : fma(w, tuned - base, base) for |w| < 1/2, fma(w - 1, tuned - base, tuned) otherwise: the bits
// of torch.lerp, except that equal elements stay as they are, and that 0 and 1 give base and tuned whatever they hold.
//
// Roofline: memory. A pair of bf16 elements moves 6 bytes for 3 operations, so an H100 at 3.3 TB/s does 550 G
// elements/s, some 60 times what PCIe 5 can deliver: behind a copy from the host this kernel is never the limit. So it
// has 16-byte accesses and a grid that the hardware schedules, nothing more. The accumulator: float64 if base is, else
// float32, with one rounding to nearest even into base's type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda/lerp.h"

namespace {

using refine_fast::ceil_div;
using refine_fast::Dtype;
using refine_fast::launch;

template <typename Wide, typename T>
__device__ Wide load_as(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return static_cast<Wide>(__bfloat162float(x));
  else if constexpr (std::is_same_v<T, __half>)
    return static_cast<Wide>(__half2float(x));
  else
    return static_cast<Wide>(x);
}

template <typename T, typename Wide>
__device__ T round_to(Wide x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// Intrinsics, so that no compiler flag contracts or splits the operations.
__device__ float interpolate(float a, float b, float w) {
  const float difference = __fsub_rn(b, a);
  if (w == 0.0f || w == 1.0f) return w == 0.0f ? a : b;
  return a == b ? a : fabsf(w) < 0.5f ? __fmaf_rn(w, difference, a) : __fmaf_rn(__fsub_rn(w, 1.0f), difference, b);
}
__device__ double interpolate(double a, double b, double w) {
  const double difference = __dsub_rn(b, a);
  if (w == 0.0 || w == 1.0) return w == 0.0 ? a : b;
  return a == b ? a : fabs(w) < 0.5 ? __fma_rn(w, difference, a) : __fma_rn(__dsub_rn(w, 1.0), difference, b);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Pack {
  T at[kCount];
};

// kCount elements a thread; the caller checks the alignment
template <typename Base, typename Tuned, typename Wide, int kCount>
__global__ void lerp_kernel(Base* __restrict__ base, const Tuned* __restrict__ tuned, int64_t packs, Wide weight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  auto a = reinterpret_cast<Pack<Base, kCount>*>(base)[i];
  const auto b = reinterpret_cast<const Pack<Tuned, kCount>*>(tuned)[i];
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    a.at[j] = round_to<Base>(interpolate(load_as<Wide>(a.at[j]), load_as<Wide>(b.at[j]), weight));
  reinterpret_cast<Pack<Base, kCount>*>(base)[i] = a;
}

template <typename Base, typename Tuned>
cudaError_t lerp(void* base_address, const void* tuned_address, int64_t n, double weight, void* stream) {
  using Wide = std::conditional_t<std::is_same_v<Base, double>, double, float>;
  constexpr int kPack = 16 / sizeof(Base), kThreads = 256;
  const auto own = static_cast<Wide>(weight);
  constexpr int64_t kMaxElements = int64_t{1} << 31;  // so that the blocks of a grid fit in 31 bits
  auto* base = static_cast<Base*>(base_address);
  auto* tuned = static_cast<const Tuned*>(tuned_address);
  const bool aligned = (reinterpret_cast<uintptr_t>(base) | reinterpret_cast<uintptr_t>(tuned)) % 16 == 0;
  for (int64_t first = 0; first < n; first += kMaxElements) {
    const int64_t count = n - first < kMaxElements ? n - first : kMaxElements;
    const int64_t packed = aligned ? count / kPack * kPack : 0;
    const int64_t packs = packed / kPack, rest = count - packed;
    REFINE_FAST_TRY(launch(lerp_kernel<Base, Tuned, Wide, kPack>, ceil_div(packs, kThreads), kThreads, 0, stream,
                           base + first, tuned + first, packs, own));
    REFINE_FAST_TRY(launch(lerp_kernel<Base, Tuned, Wide, 1>, ceil_div(rest, kThreads), kThreads, 0, stream,
                           base + first + packed, tuned + first + packed, rest, own));
  }
  return cudaSuccess;
}

template <typename Visit>
void with_type(Dtype type, Visit visit) {
  switch (type) {
    case Dtype::f32: return visit(float{});
    case Dtype::bf16: return visit(__nv_bfloat16{});
    case Dtype::f16: return visit(__half{});
    case Dtype::f64: return visit(double{});
  }
}

}  // namespace

extern "C" int refine_fast_cuda_lerp(void* base, Dtype base_type, const void* tuned, Dtype tuned_type, int64_t n,
                                     double weight, void* stream) {
  cudaError_t status = cudaErrorInvalidValue;
  with_type(base_type, [&](auto a) {
    with_type(tuned_type, [&](auto b) { status = lerp<decltype(a), decltype(b)>(base, tuned, n, weight, stream); });
  });
  return status;
}

extern "C" const char* refine_fast_cuda_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
