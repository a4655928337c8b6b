// band_topk in GPU memory: the search of csrc/core/band_topk.h, with the same results to the last bit.
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace refine_fast {

// One block of queries against a stream of documents. Every pointer belongs to the caller and is in GPU memory; the
// state of the queries lies in the workspace, and every call runs on `stream` (a cudaStream_t).
struct CudaBand {
  int64_t d, k, skip;
  double lo;
  int32_t random;      // the k smallest hash64(seed, query, document) instead of the k most similar
  int32_t band_first;  // the order "band_then_skip"
  int32_t normalize;
  uint64_t seed;
  int64_t first, rows;     // queries first .. first + rows of the whole set
  int64_t block;           // maximum documents of one push
  const double* hi;        // (rows): the upper edge of each query's band
  const int64_t* offsets;  // (rows + 1), or null: query i excludes ids[offsets[i]] .. ids[offsets[i + 1]], ascending
  const int64_t* ids;
  void* workspace;  // refine_fast_cuda_band_bytes(), 256-byte aligned
  void* stream;
  // set by the calls below
  const void* queries = nullptr;
  Dtype queries_dtype = Dtype::f32;
  int64_t queries_stride = 0;
  int64_t piece = 0;
};

// BandPart of csrc/core/band_topk.h, in GPU memory.
struct CudaBandPart {
  int64_t* ids;
  double* scores;
  int64_t* drawn_ids;
  double* drawn_scores;
  int64_t *above, *in_band;
};

// The first unusable row, as 2 row, + 1 if its norm is above 1e18 and it holds no NaN or Inf.
constexpr uint64_t kNoBadRow = ~uint64_t{0};

}  // namespace refine_fast

// Bytes of workspace for band.rows queries and band.block documents, with d, k, skip and random as given.
extern "C" int64_t refine_fast_cuda_band_bytes(const refine_fast::CudaBand* band);

// These functions return a cudaError_t and wait for the stream, except finish and finish_part.
// (rows, d), row_stride in elements. They are read again until finish.
extern "C" int refine_fast_cuda_band_set_queries(refine_fast::CudaBand* band, const void* queries,
                                                 refine_fast::Dtype dtype, int64_t row_stride, uint64_t* bad_row);
// Documents first_id .. first_id + rows; ids ascend from call to call.
extern "C" int refine_fast_cuda_band_push(refine_fast::CudaBand* band, const void* docs, refine_fast::Dtype dtype,
                                          int64_t row_stride, int64_t rows, int64_t first_id, uint64_t* bad_row);
// Writes ids and scores, (rows, k), most similar first, -1 and NaN beyond the last; in_band (rows). All in GPU memory.
extern "C" int refine_fast_cuda_band_finish(const refine_fast::CudaBand* band, int64_t* ids, float* scores,
                                            int64_t* in_band);
// Instead of finish: what it would choose from.
extern "C" int refine_fast_cuda_band_finish_part(const refine_fast::CudaBand* band,
                                                 const refine_fast::CudaBandPart* part);
