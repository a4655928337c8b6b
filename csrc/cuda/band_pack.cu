// Packs rows as float16. A panel of 256 rows shares a power of two that brings its largest element to 2^14: none
// overflows, and what lies 28 binades below is flushed to zero here, so that nothing depends on how the hardware treats
// denormals. The kernel also measures how much of each row the rounding loses.
//
// Roofline: memory. Every row is read twice, for its largest element and to be rounded, and written once. The
// accumulator. The norm divides scores and is summed in float64. The rounding error only widens a margin: it is summed
// in float32, and a bound of that sum's own error is added.
#include "cuda/band_pack.h"

#include "cuda/launch.h"

namespace refine_fast {
namespace {

constexpr int kPackThreads = 256;
constexpr double kLargestNorm = 1e18, kSmallestNorm = 1e-12;

// For x >= 0, whose bits are ordered like integers.
__device__ void raise_to(float* most, float x) { atomicMax(reinterpret_cast<int*>(most), __float_as_int(x)); }

// A lane's next kInFlight elements j, j + 32, ... of a row of count, 0 beyond: their loads overlap.
constexpr int kInFlight = 8;
template <class T>
__device__ void load_ahead(const T* row, int64_t j, int64_t count, float (&x)[kInFlight]) {
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) x[u] = j + u * 32 < count ? to_float(row[j + u * 32]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(Pack p) {
  __shared__ float largest, size, residual;
  __shared__ double norms[kPanel], sizes[kPanel];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPanel;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kPanel), p.count - first));
  if (threadIdx.x == 0) largest = size = residual = 0;
  __syncthreads();
  for (int r = warp_id(); r < rows; r += kPackThreads / 32) {
    double sum = 0;
    float most = 0;
    for (int64_t j = lane_id(); j < p.d; j += kInFlight * 32) {
      float x[kInFlight];
      load_ahead(p.rows.row<T>(first + r), j, p.d, x);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        sum = fma(static_cast<double>(x[u]), static_cast<double>(x[u]), sum), most = fmaxf(most, fabsf(x[u]));
    }
    sum = fold(sum);
    const double norm = p.normalize ? fmax(sqrt(sum), kSmallestNorm) : 1.0, own = sqrt(sum) / norm * (1 + 0x1p-20);
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, step));
    if (lane_id() == 0) {
      raise_to(&largest, static_cast<float>(most / norm));
      const auto row = static_cast<unsigned long long>(p.first_id + first + r);
      if (!isfinite(sum))
        atomicMin(p.bad_row, 2 * row);
      else if (own > kLargestNorm)
        atomicMin(p.bad_row, 2 * row + 1);
      norms[r] = p.norms[first + r] = norm;
      sizes[r] = own;
    }
  }
  __syncthreads();
  // 2^14 over the power of two in `largest`, within bounds: the product of two scales stays a normal float, and |x -
  // x'| covers what a row loses
  const int exponent = min(max(14 + 127 - (__float_as_int(largest) >> 23), -60), 60);
  const float scale = ldexpf(1, exponent), unscale = ldexpf(1, -exponent);
  for (int r = warp_id(); r < kPanel; r += kPackThreads / 32) {
    __half* out = p.packed + (first + r) * p.width;
    const double inverse = r < rows ? 1 / norms[r] : 0;
    float lost = 0;
    for (int64_t j = lane_id(); j < p.width; j += kInFlight * 32) {
      float x[kInFlight];
      load_ahead(p.rows.row<T>(first + r), j, r < rows ? p.d : 0, x);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const float scaled = static_cast<float>(x[u] * inverse) * scale;
        const __half h = __float2half_rn(fabsf(scaled) < 0x1p-14f ? 0.0f : scaled);
        const float difference = scaled - __half2float(h);  // exact
        lost = fmaf(difference, difference, lost);
        if (j + u * 32 < p.width) out[j + u * 32] = h;
      }
    }
    for (int step = 16; step > 0; step /= 2) lost += __shfl_xor_sync(kWholeWarp, lost, step);
    if (lane_id() == 0 && r < rows) {
      // the float sums of `lost` err by less than 2^-10, and by 2^-126 for each square that underflows; a normalized
      // element errs by 2^-24 of itself
      const double squares = static_cast<double>(lost) + static_cast<double>(p.d) * 0x1p-126;
      const double own = sqrt(squares) * (1 + 0x1p-10) * unscale + (p.normalize ? 0x1p-23 * sizes[r] : 0.0);
      raise_to(&size, __double2float_ru(sizes[r]));
      raise_to(&residual, __double2float_ru(own));
      if (p.edges != nullptr)
        p.edges[first + r] = {0, __double2float_ru(own), __double2float_ru(sizes[r] + own), scale};
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.panels[blockIdx.x] = {scale, size, residual, 0};
}

}  // namespace

cudaError_t launch_pack(const Pack& pack, void* stream) {
  const int64_t panels = ceil_div(pack.count, kPanel);
  if (pack.rows.dtype == Dtype::f32) return launch(pack_kernel<float>, panels, kPackThreads, 0, stream, pack);
  if (pack.rows.dtype == Dtype::f16) return launch(pack_kernel<__half>, panels, kPackThreads, 0, stream, pack);
  return launch(pack_kernel<__nv_bfloat16>, panels, kPackThreads, 0, stream, pack);
}

}  // namespace refine_fast
