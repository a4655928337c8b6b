// Rows as float16 operands of the screen.
#pragma once
#include <cuda_fp16.h>

#include "cuda/band_rows.h"
#include "cuda/band_state.h"

namespace refine_fast {

struct Pack {
  Rows rows;
  int64_t count, d, first_id;
  int32_t width;  // of a packed row: d rounded up to kTileK; elements beyond a row and rows beyond the last are zero
  bool normalize;
  __half* packed;
  double* norms;
  Edge* edges;  // residual, reach and scale of each row, or null
  Panel* panels;
  unsigned long long* bad_row;
};

cudaError_t launch_pack(const Pack& pack, void* stream);

}  // namespace refine_fast
