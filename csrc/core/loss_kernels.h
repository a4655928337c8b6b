// The row kernels of info_nce, one table per ISA level. Scores s are raw inner products, scale = 1 / temperature; a dropped score is -inf.
// n is a multiple of 16 and every array is readable that far.
#pragma once
#include "core/kernels.h"

namespace refine_fast {

struct LossKernels {
  // s[j] = -inf where ids[j] == id (no ids: nowhere) or s[j] > ceiling; the largest score left
  float (*drop)(float* s, int64_t n, const int32_t* ids, int32_t id, float ceiling);
  // s[j] = e = exp(scale (s[j] - top)), top >= every s[j]; sums[0] += e, sums[1] += e scale (s[j] - top)
  void (*exponentials)(float* s, int64_t n, float scale, float top, double* sums);
  // The other direction, one query at a time: column j's running maximum top[j] and sum[j] of exp(scale (s - top[j])) over its negatives,
  // which are the queries with ids[j] != id and s <= ceilings[j] (no ceilings: all)
  void (*column_sums)(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id, const float* ceilings, float* top, float* sum);
  // out[j] = weight[j] exp(scale (s[j] - top[j])) over the same negatives; returns the sum of out[j] scale (s[j] - positive[j])
  double (*column_weights)(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id, const float* ceilings, const float* top,
                           const float* weight, const float* positive, float* out);
  // any n
  float (*dot)(const float* x, const float* y, int64_t n);
  void (*axpy)(float a, const float* x, float* y, int64_t n);  // y += a x
};

}  // namespace refine_fast
