// info_nce in bf16 on a matrix unit: no score is stored (kernels/fused_loss_kernels.h has the kernels, isa/amx_loss.h
// what was measured).
//
// The maths is that of core/info_nce_solver.h, in two passes of 4 B N width operations each, one more product than
// with stored scores: a matrix unit recomputes S from L2 sooner than L3 returns it.
//   1. queries, panel by panel, against all documents: E = exp(S / tau - shift), its row sums, E D; then the losses,
//      and dQ from E D, each row with the factor that its sum gave
//   2. documents, panel by panel, against all queries: G = factor E, dD = G^T Q
//
// The shift of a row starts at its positive's score, so that a dominant positive cancels nothing, and is raised only
// when a chunk's weights exceed 2^60: what was summed so far is scaled by a power of two. The second pass takes the
// final shift, so it makes the same exponentials, digit by digit.
//
// Columns with the document of the row's positive are no negatives: their scores are set to -inf between product and
// exponential, from lists by document id, so the kernels compare no ids. The positive's own weight, minus the sum of
// the others, is added in float32 at the end.
//
// Blocks. A task's rows and sums (6 bytes an element) and one chunk of columns in its two layouts stay in L2 (2 MB);
// the columns come from L3 once a task, in one layout. They are packed once a pass, kPackedBytes at a time: beyond, the
// sums wait in the gradient.
//
// Results depend neither on the number of threads nor on the blocks: a panel meets the chunks in order.
#pragma once
#include <cstdint>
#include <vector>

#include "core/info_nce_batch.h"
#include "core/memory.h"
#include "kernels/fused_loss_kernels.h"

namespace refine_fast {

class InfoNCEFused : InfoNCEBatch {
 public:
  // Whether this level has the kernels and they know the task's terms.
  static bool serves(const InfoNCE& task);
  explicit InfoNCEFused(const InfoNCE& task);
  Status run();

 private:
  static constexpr int64_t kTaskBytes = 1200 << 10;
  static constexpr int64_t kPackedBytes = 13 << 20;

  // q or d
  struct Side {
    const void* rows;
    int64_t count;
    float* gradient;
  };
  // Lists of rows or columns, ascending: list n is items[first[n]] .. items[first[n + 1]].
  struct Lists {
    std::vector<int64_t> first;
    std::vector<int32_t> items;
  };
  // The pairs of a row that take no part: what is left of its list.
  struct Cursor {
    const int32_t *next, *end;
  };
  // Of a thread: the rows and sums of a task, and the second layout of a chunk of columns; in one piece, so that it
  // lies in a huge page and its lines spread evenly over the sets of L2.
  struct Scratch {
    WorkBuffer memory;
    int64_t size = 0;
    char *rows, *products;
    float* sums;
    std::vector<Cursor> cursors;
    std::vector<int32_t> excluded, active;

    void reserve(int64_t most_rows, int64_t chunk, int64_t padded, bool gradients);
  };

  template <class KeyOf>
  static Lists group(int64_t count, int64_t keys, const KeyOf& key_of);
  const uint16_t* row_of(const void* rows, int64_t i) const {
    return static_cast<const uint16_t*>(rows) + i * t_.width;
  }

  void score_positives();
  void collect(Scratch& s, int64_t first_row, int64_t rows, int64_t begin, int64_t count) const;
  // Panels of `rows` against all `columns`: multiply(operands, first row, first column) for each pair, finish(row, its
  // gradient, thread) at the end of each row.
  template <class ListOf, class Multiply, class Finish>
  void sweep(const Side& rows, const Side& columns, const ListOf& list_of, const Multiply& multiply,
             const Finish& finish);
  template <class Read>
  void finish_query(int64_t i, const Read& read, int thread);
  template <class Read>
  void finish_document(int64_t j, const Read& read, int thread);

  const FusedLossKernels& fused_;
  const int64_t padded_;                      // width
  const float rate_;                          // log2(e) / tau: y is in units of log 2
  Lists documents_of_, queries_of_, owners_;  // by document id, by that of the positive; queries by their positive
  // by query: y = fma(S norm, k, b); see QueryTerms and DocumentTerms
  Buffer<float> k_, b_, positive_, factor_, ceiling_;
  Buffer<float> own_;  // G of the positive
  Buffer<double> total_, moment_;
  Buffer<float> norms_;  // of the documents, padded
  WorkBuffer columns_;
  int64_t group_;                 // columns packed at a time
  std::vector<Scratch> scratch_;  // by thread
};

}  // namespace refine_fast
