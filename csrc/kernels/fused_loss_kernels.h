// The kernels of info_nce without stored scores (core/info_nce_fused.h), for a level whose matrix unit recomputes a
// score sooner than memory returns it. One panel of `rows` rows of one side, kept in cache, meets a chunk of the other
// side's rows, the columns: their scores S, the weights E = 2^y of these, and the sum of E times the columns, all
// within one call.
//
// y = fma(S_rc norm, k, b) with k = log2(e) / tau, times a norm where rows are scaled to unit length. The pass over
// queries and the pass over documents evaluate it in the same order of operations, so that both make the same decisions
// of it.
#pragma once
#include <cstdint>

namespace refine_fast {

// Operands in bf16, packed; all are padded with zeros to multiples of 32. Arrays by column can be read up to one.
struct FusedOperands {
  const void* rows;      // pack_rows
  const void* columns;   // pack_columns of every 32 columns of the chunk, one after the other
  const void* products;  // pair_columns of these
  int64_t width;         // of a row
  int64_t count;         // columns, at most max_columns
  // Pairs that take no part, tile after tile: column * 32 + row
  const int32_t* excluded;
  int64_t excluded_count;
  float* sums;  // in the tiles' order, see read_sums: added to; null to leave the products out
};

// Rows are queries: their loss's sums are made, and the shift b is raised where a weight grows too large.
struct QueryTerms {
  float *k, *b;            // (rows)
  const float* positive;   // (rows) S norm of the positive; used with a margin
  double *total, *moment;  // (rows) sums of E and of E y, added to
  const float* norms;      // (count) of the documents, factors of S and of E in the products; null: 1
  float margin;            // in y; infinity to switch it off
};

// Rows are documents, columns queries, E is multiplied by their factors.
struct DocumentTerms {
  const float *k, *b, *factor;  // (count)
  const float* ceiling;         // (count) in y; null without a margin
  const float* norms;           // (rows) factors of S; null: 1
};

struct FusedLossKernels {
  int32_t rows, max_columns;
  // Bytes of a packed panel of rows or of columns are round_up(width, 32) * 64, those of `products` as many for every
  // 32 columns; sums take round_up(width, 32) * 32 floats.
  void (*pack_rows)(const uint16_t* src, int64_t stride, int64_t rows, int64_t width, void* panel);
  void (*pack_columns)(const uint16_t* src, int64_t stride, int64_t columns, int64_t width, void* panel);
  void (*pair_columns)(const void* columns, int64_t count, int64_t width, void* products);
  // The scores of row r with column r, for `rows` pairs of a panel of rows and a panel of columns.
  void (*score_pairs)(const void* rows, const void* columns, int64_t width, float* scores);
  void (*queries)(const FusedOperands& operands, const QueryTerms& terms);
  void (*documents)(const FusedOperands& operands, const DocumentTerms& terms);
  // out = factor * row r of the sums, and the way back
  void (*read_sums)(const float* sums, int64_t row, int64_t width, float factor, float* out);
  void (*write_sums)(const float* row_values, int64_t row, int64_t width, float* sums);
  void (*begin_tiles)();
  void (*end_tiles)();
};

}  // namespace refine_fast
