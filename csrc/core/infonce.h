// info_nce: cross_entropy(q d^T / temperature, positives) without its B x N matrix, and its gradients in the same sweep.
#pragma once
#include "core/types.h"

namespace refine_fast {

// Row-major and contiguous; q, d and hard of type `dtype` (f32, bf16 or f16), everything else as declared. A null pointer switches its term off.
struct InfoNCE {
  const void* q;              // (rows, width)
  const void* d;              // (columns, width)
  const void* hard;           // (rows, hards, width)
  const int64_t* positives;   // (rows): a row of d
  const int64_t* doc_ids;     // (columns)
  const uint8_t* hard_mask;   // (rows, hards)
  const float* coefficients;  // (rows): the gradients are those of sum_i coefficients[i] loss[i]; null: losses only
  int64_t rows, columns, width, hards;  // at least 1, but for hards
  Dtype dtype;
  float temperature, margin;  // margin: infinity for none
  bool symmetric, normalize;
  int threads;

  float* loss;                // (rows), or (2, rows) if symmetric: from the queries, from the positives; a row's loss is their mean
  float *grad_q, *grad_d, *grad_hard, *grad_temperature;  // shaped as the inputs, (1) for the last; null without coefficients
};

Status info_nce(const InfoNCE& task);

}  // namespace refine_fast
