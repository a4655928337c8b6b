// The screen of band_topk: a fast product of rounded rows whose error is known for each row (core/band_topk.h bounds
// it).
#pragma once
#include <cstdint>

namespace refine_fast {

struct BandList;  // kernels/select_kernels.h

// Documents that take no part: of query `row` of a panel, the one of `column`.
struct ExcludedPair {
  int32_t column, row;
};

// A panel of queries against consecutive panels of documents.
struct ScreenRun {
  const void *a, *b;  // one packed panel of queries, ceil(columns / nr) of documents, one after the other
  int64_t d, columns;
  int32_t first;                 // what the first column is appended as
  BandList* lists;               // of the mr queries; those beyond the last have thresholds of +inf
  int64_t room;                  // entries of a list; `full` is called for one without room for nr + 16 more
  const ExcludedPair* excluded;  // by ascending column; the last has a column beyond all
  void (*full)(void* context, int32_t row);  // makes room
  void* context;
  const char* ahead;
  float* scores;  // mr * round_up(columns, nr), 64-byte aligned, overwritten
};

// Operands have the format of the level's fastest multiplier that is accurate enough: 8- or 16-bit integers
// (isa/screen_int.h), bf16 (isa/amx.cc) or float32 (isa/screen_f32.h). A panel of `width` rows takes round_up(d, kr) *
// width * element_bytes + width * scale_bytes bytes, 64-byte aligned.
struct ScreenKernels {
  int32_t mr, nr, kr;     // rows (queries) and columns (documents) of a tile, granularity of d
  int32_t element_bytes;  // of an operand
  int32_t scale_bytes;    // of a row's scale; 0 if the operands are the values themselves
  bool exact;             // the sums are integers: only their conversion rounds
  // Rounds `count` <= mr (nr) rows x of d floats to operands x', zero beyond count and d. norms[r] >= |x|; residuals[r]
  // = |x - x'|^2, up to the rounding of a float32 sum of d terms.
  void (*pack_a)(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel,
                 double* residuals);
  void (*pack_b)(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel,
                 double* residuals);
  // Writes the whole mr x nr tile of scores x' . y', row stride ld.
  void (*tile)(const void* a, const void* b, int64_t d, float* scores, int64_t ld);
  // tile and SelectKernels::append for all columns of a run, where the level does both faster in one pass; else null.
  void (*run)(const ScreenRun& run) = nullptr;
  // as in MatmulKernels
  void (*begin_tiles)() = nullptr;
  void (*end_tiles)() = nullptr;
};

}  // namespace refine_fast
