// The kernels of band_topk after its matrix product: threshold-and-append over a row of scores, and float64 scores of
// what was appended.
#pragma once
#include <cstdint>

namespace refine_fast {

// What happens to a document with the screened score s, which is exact to within a known margin:
//   s < floor            certainly below the band                     dropped
//   floor <= s < sure    perhaps in the band                          appended, rescored
//   sure <= s < keep     certainly in the band, certainly not chosen  counted
//   keep <= s <= ceil    may be chosen, or lies at the upper edge     appended
//   s > ceil             certainly above the band                     dropped
// with floor <= sure <= keep <= ceil. NaN marks an excluded document: it fails every comparison.
struct BandThresholds {
  float floor, sure, keep, ceil;
};

// The documents of one query that wait for their float64 score.
struct BandList {
  BandThresholds thresholds;
  int32_t* index;
  float* score;     // screened
  int64_t size;     // of index and score
  int64_t counted;  // documents in the band that wait no more
};

struct SelectKernels {
  // For j in [0, n): appends (first + j, scores[j]) to the list, counts or drops, as the table above says. The list has
  // room for n + 16 more entries.
  void (*append)(const float* scores, int64_t n, int32_t first, BandList* list);
  // The sum of x[i] y[i] in float64. A product of two floats is exact there, so only the order of the sum matters, and
  // every level uses the same: lane l of 32 sums the i = l (mod 32) in ascending order; then the lanes are folded,
  // fold[i] = (l[i] + l[i+8]) + (l[i+16] + l[i+24]), and the eight results by i + 4, i + 2 and i + 1.
  double (*dot)(const float* x, const float* y, int64_t d);
};

}  // namespace refine_fast
