// info_nce with stored scores, strip by strip: every level, type and term (core/info_nce_fused.h: without, in bf16).
//
// The maths. s_ij = q_i . d_j, p_i = softmax over j of s_ij / tau, loss_i = -log p_i,pos(i), and with c_i =
// coefficients[i]:
//     G_ij = c_i / tau (p_ij - [j = pos(i)])        dq_i = sum_j G_ij d_j        dd_j = sum_i G_ij q_i
//
// One strip of rows at a time (all columns; at most kStripBytes, so the B x N matrix never exists):
//   1. S = Q D^T, block of columns by block, D packed on the fly            (info_nce_scores.cc)
//   2. for each row: the exact maximum over its negatives, the sum of exp((S - max) / tau), the loss
//   3. block by block, from cache: G from S, dQ += G D and dD += G^T Q      (info_nce_gradients.cc)
//
// Roofline. 6 B N width operations, the minimum. Measured on one Zen 5 core at B = 8,192, GFLOP/s:
//              width 384   width 768   peak
//     fp32        205         210       248
//     bf16        368         404       495
// On one core of a Xeon with AMX, fp32 by six bf16 products (isa/amx_f32.h): 193 and 201, torch's chunks 119 and 125.
//
// The accumulator. A strip holds whole rows, so the maximum is known before the first exponential: no running rescale,
// and no fixed shift that could underflow. Any temperature and any finite scores are safe; the price is that each
// exponential is computed twice. Q and D enter the products unchanged, so in bf16 only G is rounded, which gives less
// error than torch. The positive's weight is p - 1 = -(sum of the others), and is kept as that sum: nothing cancels
// when the positive dominates.
//
// Prefixes (Kusupati et al., arXiv 2205.13147: the loss over several prefix lengths at once) cost one product of the
// full width. Scores add up from slice to slice of the width, S_m = S_m-1 + Q[slice m] D[slice m]^T, and so do the
// weights, from the last slice to the first: dQ[slice m] = (G_m + G_m+1 + ...) D[slice m]. A strip then holds the
// scores of every prefix, in fewer rows.
//
// normalize scales the scores, s = (q . d) / (|q| |d|), not the operands. Through u = x / |x| the gradient is (g - (g .
// u) u) / |x|, and g . u of a row or column is the sum of G_ij s_ij over it, so no prefix needs a gradient of its own.
//
// symmetric adds the softmax over queries i of s_i,pos(k) for each k (info_nce_symmetric.cc). Its sums need every row,
// so a sweep of step 1 alone comes first: 8 B N width.
//
// Results do not depend on the number of threads: tasks are cut by the shape alone, each owns its output, and shared
// sums are added in order. Two threads on that Xeon, fp32, B = 8,192: 1.6 to 1.9 times one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/info_nce_batch.h"
#include "core/matmul.h"
#include "core/memory.h"
#include "core/numeric.h"
#include "core/stages.h"
#include "kernels/kernels.h"
#include "kernels/loss_kernels.h"

namespace refine_fast {

class InfoNCESolver : InfoNCEBatch {
 public:
  explicit InfoNCESolver(const InfoNCE& task);
  Status run();

 private:
  static constexpr int64_t kBlock = 192;            // columns at a time, D's panels in L2; a multiple of 16, mr and nr
  static constexpr int64_t kGroups = 16;            // of a strip's rows, which take turns in step 3
  static constexpr int64_t kMaxRows = 640;          // of a strip: beyond, packing D and adding to dD no longer matter
  static constexpr int64_t kStripBytes = 24 << 20;  // all that grows with a strip's rows
  static constexpr int64_t kPairs = 12;             // queries of a task that scores them with their positives
  static constexpr int64_t kPrefetchRows = 8;       // prefetch distance in rows of scores

  struct Strip {
    int64_t begin, rows;
  };
  struct Block {  // of columns
    int64_t begin, columns;
  };
  // with the offsets of its panels among the strip's
  struct Slice : Range {
    int64_t packed_q, packed_rows;
  };
  struct RowPart {  // what a block's pairs add to a row's part of the temperature's gradient and to its moment
    double tau;
    float moment;
  };
  // Of a thread: G of a block of columns, packed as the left operand of dQ and of dD; the block's documents, packed;
  // the other direction's parts of the strip's rows.
  struct Work {
    float* g;
    char *g_rows, *g_columns, *documents;
    RowPart* parts;
  };
  struct Row : Weights {  // of a strip, under one prefix
    float top, ceiling;   // the largest score, and the largest that a negative may have
  };
  // The other direction under one prefix, by slot: the pair's score, the margin's ceiling, the maximum and the sum over
  // its negatives, by how much rounding made the sum too large, coefficient / (2 tau sum)
  struct Pairs {
    explicit Pairs(int64_t slots)
        : positive(slots), ceiling(slots), top(slots), sum(slots), excess(slots), weight(slots) {}
    std::vector<float> positive, ceiling, top, sum, excess, weight;
  };

  static const MatmulKernels& product(const InfoNCE& t);
  static bool is_direct(const InfoNCE& t);
  static int64_t scratch_floats(const InfoNCE& t);
  static int64_t rows_of_strip(const InfoNCE& t, int64_t pitch, int64_t private_pitch, const MatmulKernels& mm);

  // --- access
  Block block(int64_t b) const { return {b * kBlock, std::min(kBlock, t_.columns - b * kBlock)}; }
  float* scores(int64_t m, int64_t r) const { return strip_ + (m * strip_rows_ + r) * pitch_; }
  Row& row(int64_t m, int64_t r) const { return rows_[m * strip_rows_ + r]; }
  Private own_negatives(int64_t r) const {
    return {hard_ + r * private_pitch_, hard_weight_ + r * private_pitch_, strip_rows_ * private_pitch_};
  }
  int64_t group_rows(const Strip& s) const { return round_up(ceil_div(s.rows, kGroups), mm_.mr); }
  int64_t g_bytes() const { return bytes_a(mm_, strip_rows_, kBlock) + bytes_a(mm_, kBlock, strip_rows_); }
  Work work(int thread) const {
    char* g = packed_g_ + (gradients_ ? thread * g_bytes() : 0);
    return {g_ + (gradients_ ? thread * strip_rows_ * kBlock : 0), g, g + bytes_a(mm_, strip_rows_, kBlock),
            documents_ + thread * document_bytes_, parts_ + (gradients_ && t_.symmetric ? thread * strip_rows_ : 0)};
  }
  float* slot_scratch(int thread) const { return slot_scratch_.get() + thread * 2 * max_slots_; }

  // --- scores (info_nce_scores.cc)
  void pack_documents(const Block& b, const Slice& slice, bool transposed, char* out, float* scratch) const;
  void pack_queries(const Strip& s);
  void score_strip(const Strip& s);
  void row_softmax(const Strip& s, int64_t r, int thread);

  // --- gradients (info_nce_gradients.cc)
  void make_weights(const Strip& s, const Block& b, int64_t m, int64_t r, float* column_moments, int thread) const;
  void accumulate_gradients(const Strip& s);
  void finish_row(const Strip& s, int64_t r, int thread) const;
  void finish_document(int64_t j, int thread) const;

  // --- the other direction (info_nce_symmetric.cc)
  void index_pairs();
  void score_pairs();
  const float* gather(int64_t m, int64_t r, int64_t begin, int64_t n, float* out) const;
  void sum_columns(const Strip& s);
  void finish_columns();
  void add_column_weights(int64_t i, int64_t r, const Block& b, int64_t m, float* weights, int thread) const;

  const MatmulKernels& mm_;
  const bool direct_;  // D is packed without a float32 copy
  const int64_t blocks_, pitch_, strip_rows_;
  const int64_t document_bytes_;  // of a block, packed
  std::vector<Slice> slices_;

  // of the whole batch
  Buffer<float> column_moment_;  // sum_i G_ij s_ij by prefix, if normalize

  // The other direction: a slot for every query, in the order of their positives. Each block of columns begins at a
  // multiple of 16 slots; unused slots have weight 0.
  std::vector<int64_t> first_slot_, slot_of_, column_;
  std::vector<int32_t> slot_ids_;
  std::vector<Pairs> pairs_;
  int64_t max_slots_ = 0;  // of a block

  // of a strip
  Buffer<float> strip_, hard_, hard_weight_, q_;
  Buffer<Row> rows_;
  Buffer<char> packed_q_, packed_rows_;  // the strip's queries as the left operand of S and as the right operand of dD
  const float* queries_ = nullptr;       // as float32

  // of a thread
  Buffer<float> g_;
  Buffer<char> packed_g_, documents_;
  Buffer<RowPart> parts_;
  std::unique_ptr<float[]> slot_scratch_;
};

}  // namespace refine_fast
