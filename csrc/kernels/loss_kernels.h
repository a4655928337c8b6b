// The row kernels of info_nce, one table for each ISA level. Scores s are inner products, scale = 1 / temperature.
// Lengths are multiples of 16 unless stated otherwise, and every array is readable to that length.
#pragma once
#include "kernels/kernels.h"

namespace refine_fast {

// The scores of one query. Column j is a negative if ids[j] != id (without ids: always) and s[j] <= ceiling.
struct ScoreRow {
  const float* s;
  const int32_t* ids;
  int64_t n;
  int32_t id;
  float ceiling;
};

struct LossKernels {
  // the largest score of a negative, -inf without negatives
  float (*top)(ScoreRow row);
  // with e_j = exp(scale (s[j] - top)) of the negatives, top >= each of them: sums[0] += e_j, sums[1] += e_j scale
  // (s[j] - top)
  void (*sums)(ScoreRow row, float scale, float top, double* sums);
  // out[j] = factor e_j, 0 if j is not a negative; out may be s
  void (*weights)(ScoreRow row, float scale, float top, float factor, float* out);
  // The other direction, one query at a time: for column j the running maximum top[j] and the sum[j] of exp(scale (s -
  // top[j])) over its negatives, which are the queries with ids[j] != id and s <= ceilings[j] (without ceilings: all);
  // excess[j] is by how much rounding made sum[j] too large
  void (*column_sums)(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id, const float* ceilings,
                      float* top, float* sum, float* excess);
  // out[j] = weight[j] exp(scale (s[j] - top[j])) for the same negatives; returns the sum of out[j] scale (s[j] -
  // positive[j])
  double (*column_weights)(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id,
                           const float* ceilings, const float* top, const float* weight, const float* positive,
                           float* out);
  // any n
  float (*dot)(const float* x, const float* y, int64_t n);
  void (*axpy)(float a, const float* x, float* y, int64_t n);  // y += a x
};

}  // namespace refine_fast
