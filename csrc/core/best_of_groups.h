// The highest inner product of each query in each group of consecutive rows, without the matrix of all products.
//
// Rows are packed in pieces that stay in L2. A strip of a piece times a few dozen queries gives scores that stay in L1,
// where each row's scores are folded into those of its group: rows lie along A and queries along B, so the fold is a
// vertical maximum over adjacent queries. Fewer queries than 3/8 of a tile's columns take no tile: it would multiply
// zeros, and packing the rows would cost more than the product. They take LossKernels::dot, up to four of them at the
// rate at which the rows arrive from memory.
//
// Roofline. 2 Q S d operations against S d elements, read once: memory is the limit for one query, the multipliers are
// for dozens. In between, packing is: one Zen 4 core takes .4 us (avx512; avx2: .3 us) for a row of d = 384 and a
// tile's queries, and .02 us (.04 us) more for each query without a tile. The fold adds Q S / 4 vector maxima of 4
// floats, 2% of the product at d = 384.
#pragma once
#include <cstdint>

#include "kernels/kernels.h"

namespace refine_fast {

struct BestOfGroups {
  const float* queries;  // (count, d), rows adjacent
  int64_t count, d;
  const void* rows;
  Dtype dtype;
  int64_t row_stride;      // in elements
  const int64_t* offsets;  // (groups + 1), ascending: group g has the rows offsets[g] - offsets[0] and on, at least one
  int64_t groups;
  float* best;  // (count, groups)
  int64_t best_stride;
  int threads;
  Poll poll;
};

// Writes `best`. A score that is NaN makes its group's NaN.
Status best_of_groups(const BestOfGroups& task);

}  // namespace refine_fast
