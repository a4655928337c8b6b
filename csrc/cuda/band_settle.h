// The state of each query: its start, the float64 scores of its candidates, and the result.
#pragma once
#include "cuda/band_lists.h"
#include "cuda/band_rows.h"
#include "cuda/band_state.h"

namespace refine_fast {

struct Rule {
  double lo;
  int64_t d, skip;
  bool random, band_first, normalize;
};

struct Begin {
  Rule rule;
  Lists lists;
  Exclude exclude;
  uint64_t seed;
  int64_t first, rows;
  const double *hi, *norms;
  Edge* edges;
  Query* queries;
  int32_t *found, *counted;
};

struct Settle {
  Rule rule;
  Lists lists;
  Exclude exclude;
  Rows queries, docs;
  const double* doc_norms;
  int64_t first_id;
  int32_t end;  // documents of the block that have been searched
  const int32_t* active;
  Query* states;
  int32_t *found, *counted;
  const int32_t* candidates;
  int32_t capacity;
  int32_t *overflowed, *overflowed_count;  // the queries that had more candidates
};

struct Finish {
  Rule rule;
  Lists lists;
  int64_t k;
  const Query* states;
  int64_t* ids;
  float* scores;
  int64_t* in_band;
};

// The state of each query as it is, for a merge with a search of other documents.
struct FinishPart {
  Rule rule;
  Lists lists;
  const Query* states;
  int64_t* ids;
  double* scores;
  int64_t* drawn_ids;
  double* drawn_scores;
  int64_t *above, *in_band;
};

cudaError_t launch_begin(const Begin& begin, void* stream);
cudaError_t launch_settle(const Settle& settle, int64_t active_count, void* stream);
cudaError_t launch_finish(const Finish& finish, int64_t rows, void* stream);
cudaError_t launch_finish_part(const FinishPart& part, int64_t rows, void* stream);

}  // namespace refine_fast
