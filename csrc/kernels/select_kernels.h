// The kernels of band_topk beside its matrix product: threshold-and-append over a row of scores, and the float64 rescoring of what it appended.
#pragma once
#include <cstdint>

namespace refine_fast {

// Where a screened score s (exact to within a known margin) stands:
//   s < floor            certainly below the band                     dropped
//   floor <= s < sure    perhaps in the band                          appended, rescored
//   sure <= s < keep     certainly in the band, certainly not chosen  counted
//   keep <= s <= ceil    may be chosen, or lies at the upper edge     appended
//   s > ceil             certainly above the band                     dropped
// with floor <= sure <= keep <= ceil. NaN fails every comparison: the mark of an excluded document.
struct BandThresholds {
  float floor, sure, keep, ceil;
};

struct SelectKernels {
  // Appends (first + j, scores[j]) to (index, score) for the j in [0, n) that the table above appends, adds the counted ones to *counted,
  // and returns how many were appended. index and score have room for n + 16 entries.
  int64_t (*append)(const float* scores, int64_t n, const BandThresholds* thresholds, int32_t first, int32_t* index, float* score, int64_t* counted);
  // sum x[i] y[i] in float64. The product of two floats is exact there, so only the order of the sum matters, and it is the same at every
  // level: lane l of 32 sums the i = l (mod 32) in ascending order; then lanes are folded as fold[i] = (l[i] + l[i+8]) + (l[i+16] + l[i+24]),
  // i + 4, i + 2, i + 1.
  double (*dot)(const float* x, const float* y, int64_t d);
};

}  // namespace refine_fast
