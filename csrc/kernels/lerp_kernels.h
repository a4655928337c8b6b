// The kernels behind fuse, one table for each ISA level. Every level computes the same bits as
//     base == tuned ? base : torch.lerp(base, tuned, w)
// that is fma(w, b - a, a) for |w| < 1/2 and fma(w - 1, b - a, b) otherwise: one rounding after that of the
// subtraction. Equal elements are copied, since torch.lerp would turn the -inf of a mask into NaN and -0 into +0:
// weights that were not trained must not change. (The payload of a NaN is unspecified.)
// For the weights 0 and 1 a caller gives one input twice: the other may not be finite.
//
// Roofline: memory, two reads and one write. Types without a kernel of their own pass through float32 in blocks that
// stay in L1 (core/lerp.cc).
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace refine_fast {

// How much a tensor changed: sums over its elements in float64, of the values as stored.
struct Change {
  double change_squared = 0;  // (out - base)^2
  double base_squared = 0;    // base^2
  int64_t not_finite = 0;     // NaN or infinite in out
  int64_t differing = 0;      // bytes in which a copied tensor differs from tuned's
};

struct LerpKernels {
  void (*f32)(const float* base, const float* tuned, int64_t n, float weight, float* out);
  void (*f64)(const double* base, const double* tuned, int64_t n, double weight, double* out);
  // Both inputs and the output in one 16-bit type; null where a level has none.
  void (*half)(const uint16_t* base, const uint16_t* tuned, Dtype dtype, int64_t n, float weight, uint16_t* out);
  // Adds to the first three sums of `change`. n is at most a few thousand, since a level may sum in float32.
  void (*change)(const float* base, const float* out, int64_t n, Change* change);
};

}  // namespace refine_fast
