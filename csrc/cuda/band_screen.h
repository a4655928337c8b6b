// The screen of band_topk: every query against a range of packed documents. Documents that may be chosen are appended
// to the query's candidates.
#pragma once
#include <cuda_fp16.h>

#include "cuda/band_state.h"

namespace refine_fast {

struct Screen {
  const __half *queries, *docs;
  int32_t width;
  const int32_t* active;  // the queries that take part; null: all
  int32_t active_count;
  int32_t begin, end;  // documents of the block; begin is a multiple of kPanel
  int64_t first_id;    // of the block
  const Edge* edges;
  const Panel* panels;
  const Query* states;
  Exclude exclude;
  bool random;
  float low, sum;       // lo rounded up; (d + 16) 2^-22
  int32_t* found;       // (rows): how many candidates each query has; may exceed `capacity`
  int32_t* counted;     // (rows): documents that are certainly in the band and certainly not chosen
  int32_t* candidates;  // (rows, capacity): documents of the block
  int32_t capacity;
};

cudaError_t launch_screen(const Screen& screen, void* stream);

}  // namespace refine_fast
