// info_nce: cross_entropy(q d^T / temperature, positives) without the B x N matrix, and its gradients in the same
// sweep.
#pragma once
#include "kernels/types.h"

namespace refine_fast {

// Arrays are row-major and contiguous; q, d and hard have the type `dtype` (f32, bf16 or f16), the others as declared.
// A null pointer switches its term off. The loss of row i is the sum over m of prefix_weights[m] times its loss over
// the first prefixes[m] columns of q, d and hard.
struct InfoNCE {
  const void* q;              // (rows, width)
  const void* d;              // (columns, width)
  const void* hard;           // (rows, hards, width)
  const int64_t* positives;   // (rows): each query's row of d
  const int64_t* doc_ids;     // (columns)
  const uint8_t* hard_mask;   // (rows, hards)
  const float* coefficients;  // (rows): gradients are those of sum_i coefficients[i] loss[i]; null: only losses
  const int64_t* prefixes;    // (prefix_count): ascending, the last is width
  const float* prefix_weights;
  int64_t rows, columns, width, hards, prefix_count;  // at least 1; hards at least 0
  Dtype dtype;
  float temperature, margin;  // margin: infinity to switch it off
  bool symmetric, normalize;  // normalize: each prefix to unit length
  int threads;

  // (prefix_count, rows), or (prefix_count, 2, rows) if symmetric: from the queries, from the positives
  float* loss;
  // shaped like the inputs, (1) for the last; null without coefficients
  float *grad_q, *grad_d, *grad_hard, *grad_temperature;
  Poll poll;
};

Status info_nce(const InfoNCE& task);

}  // namespace refine_fast
