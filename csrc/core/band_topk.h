// Exact band search without the B x N similarity matrix: for each query drop the `skip` most similar documents, keep lo
// <= s <= hi, take k.
//
// The maths. s = q . d (divided by the two norms with `normalize`), defined as the float64 sum in the fixed order of
// SelectKernels::dot. Its rank, ties by lower id, and its comparisons with lo and hi decide everything, so the answer
// is the same for every ISA level, thread count and block size.
//
// The screen. A tile product of rounded rows (kernels/screen_kernels.h) gives s~ with |s - s~| <= e. For the rounded
// operands x', y' of a query and a document (or the largest |y| and |y - y'| of a block of them),
//     e = |x - x'| |y|  +  (|x| + |x - x'|) |y - y'|  +  c 2^-23 (|x| + |x - x'|) (|y| + |y - y'|):
// Cauchy-Schwarz on the rounding of each operand, plus the rounding of the tile itself. c = 4 for integers, whose sum
// is exact; for the others c 2^-23 is twice the bound d 2^-24 of a float32 sum. e at d = 384:
//     8-bit integers   16-bit integers   bf16 (AMX)   float32 (no SIMD, NEON)
//          .014            2.5e-4           3e-3              5e-5
// s~ then settles most documents (BandThresholds): below the band they are dropped, inside it but certainly worse than
// the k-th best they are counted. The others wait in the query's list until the end of their block.
//
// Settling (core/band_settle.cc). A list is looked through at the end of a block, or when it is full: each document's
// own e narrows its doubt, and bisection over the lower bounds s~ - e raises that of the last that is kept
// (Query::worst) without a float64 score. What is still in doubt is rescored while its block is in cache, in the order
// of the documents, for up to kBatch pairs at a time: each row passes by once for many queries, whose rows stay in L2.
//
// What is kept: k + skip hits for each query. The number of documents above the band (a count that saturates at skip)
// decides at the end how many of them to drop. A list that would stay full is rescored at once, so a band that holds
// everything costs time but no memory. select = random keeps the smallest hashes instead, which do not depend on the
// order of arrival, and beside them the `skip` most similar.
//
// Groups. A document may be a group of rows, its score that of its best row. The maximum of screened scores errs by no
// more than the worst of them, so a strip's scores are folded into those of its documents before the thresholds, with
// the largest norm and residual of a document's rows for its own; a document that the strip cuts waits in Query::open.
//
// Roofline. 2 B N d operations against N d elements, read once for each block of queries: the product is the limit for
// B beyond a few dozen. Documents are packed once for each block of queries, into a buffer that stays in L3; a strip of
// them stays in L2, a panel of queries and its scores in L1. Measured on Zen 5, one thread, B = 4,096, N = 200,000, k =
// 100, CPU seconds (faiss's OpenBLAS multiplies with AVX-512; "product" is the time at the multipliers' own rate,
// isa/screen_int.h):
//     d      faiss top 100   avx2   avx512   avx512_bf16
//     384        5.92        3.62    1.93       1.26
//       product              2.97    1.57        .67
//     768       11.9         7.46    4.12       2.53
//
// AMX (ScreenKernels::run, isa/amx_screen.h) compares a tile's scores while they are in L1, between the multiplications
// of the next tile. On one core of a Xeon with AMX, CPU seconds in one run: .84 at d = 384 and 1.60 at 768, faiss 5.01
// and 9.08; 5 to 9% and 3 to 4% more with lists, heaps and queries in small pages. About 400 documents a query are
// rescored, 128 of them at the band's edges: 90 to 110 ns each at d = 384, 46 of them arithmetic, where query by query
// took 185. Tried there without gain:
//   - A float32 sum that settles most documents at the edges before the float64 one: its branch costs what it saves.
//   - Rescoring at the end of all documents: 262 a query, but at 500 ns each from memory.
//   - Blocks of half the size, or of 2 to 8 times: fewer are rescored, but from farther away.
//   - Prefetches at other distances and into other levels; rows fetched while documents are packed.
//   - A document widened to float64 once for all its queries; queries prefetched; documents in the queries' order.
//   - Documents that wait for several blocks: a tenth fewer are rescored, each from farther away.
//   - The list's hits one by one, without compression: 40 cycles each, since stores and loads of its size alternate.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "kernels/kernels.h"
#include "kernels/screen_kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {

enum class Order : int32_t { skip_then_band = 0, band_then_skip = 1 };

struct BandSpec {
  int64_t d, k, skip;
  double lo;
  bool random;  // take the k smallest hash64(seed, query, document) instead of the k most similar
  uint64_t seed;
  Order order;
  bool normalize;
  int threads;
  int64_t largest = 1;  // the most rows of a document
};

// One list of ids for each query: row i is ids[offsets[i]] .. ids[offsets[i + 1]], ascending.
struct Ragged {
  const int64_t* offsets;
  const int64_t* ids;
};

struct Hit {
  double score;
  int64_t id;
};

// Where BandSearch::finish_part writes: for each query what a merge with a search of other documents needs.
struct BandPart {
  int64_t* ids;          // (rows, kept) the most similar in the band, most similar first, -1 beyond the last
  double* scores;        // likewise, NaN beyond the last
  int64_t* drawn_ids;    // (rows, drawn) with random: those with the smallest hashes, smallest first
  double* drawn_scores;  // likewise
  int64_t* above;        // (rows) documents above the band, at most `skip`; 0 for band_then_skip, which ignores them
  int64_t* in_band;      // (rows) documents in the band, before any is skipped
};

// One block of queries against a stream of documents. All memory is allocated once, in proportion to the queries.
class BandSearch {
 public:
  // How many queries one search can hold within `bytes` (at least one): whole panels of them unless k or skip is huge.
  static int64_t queries_within(const BandSpec& spec, int64_t bytes);

  // Queries first .. first + rows of the whole set; hi (rows) is the upper edge of each query's band. hi and exclude
  // must outlive the search.
  BandSearch(const BandSpec& spec, int64_t first, int64_t rows, const double* hi, Ragged exclude);
  // Copies the queries, (rows, d), row_stride in elements.
  Status set_queries(const void* queries, Dtype dtype, int64_t row_stride);
  // Searches documents first_id .. first_id + count; ids ascend from call to call. row_stride in elements. offsets:
  // null, or (count + 1) ascending: document i has the rows offsets[i] - offsets[0] and on, at least one.
  Status push(const void* docs, Dtype dtype, int64_t row_stride, int64_t count, int64_t first_id, Poll poll,
              const int64_t* offsets = nullptr);
  // Writes ids and scores, (rows, k), most similar first, -1 and NaN beyond the last; in_band (rows).
  void finish(int64_t* ids, float* scores, int64_t* in_band);
  // Instead of finish: what it would choose from. kept = k + skip and drawn = 0; with random, skip and k + skip.
  void finish_part(const BandPart& part);

 private:
  // Sizes, from the shape and the kernels.
  struct Plan {
    Plan(const BandSpec& spec, const ScreenKernels& screen);
    bool runs;                 // by ScreenKernels::run: the rows of a document need a strip to be folded
    int64_t panel_a, panel_b;  // bytes of a packed panel of queries, of documents
    int64_t strip;  // rows of documents in L2 at a time; a panel of queries times a strip gives scores that fit L1
    int64_t block;  // rows of documents packed at a time, all those of a document among them
    int64_t kept, drawn;  // entries of a query: most similar hits, random hits
    int64_t may_wait;     // entries of a query's list: documents that wait for their float64 score
    int64_t waiting;      // and room for those of a strip
    int64_t bytes_per_query, bytes_fixed;
  };
  // Upper bounds of |y| and |y - y'|: of a row, or the largest of several.
  struct Bound {
    float size = 0, residual = 0;
    void widen(const Bound& other) { size = std::max(size, other.size), residual = std::max(residual, other.residual); }
  };
  struct Query {
    double norm;  // the divisor of its scores with normalize
    // of the bound e of |s - s~|
    double per_size, per_residual, least;
    double margin(const Bound& y) const { return per_size * y.size + per_residual * y.residual + least; }
    float open;             // the best score so far of a document whose last rows are in the next strip
    double worst;           // at least `kept` documents of the band score as much; -inf until they are known
    int64_t above;          // documents above the band (saturates)
    int64_t next_excluded;  // index of the first excluded id not yet passed
    uint64_t hash;          // of (seed, query)
    int32_t kept, drawn;    // of the heaps
  };
  struct Rows {
    const char* data;
    Dtype dtype;
    int64_t row_bytes;
  };
  // Documents that are packed at a time, and have settled before the next. Lists count them from its first.
  struct Block {
    Rows docs;
    int64_t rows, documents, first_id;
    const int64_t* offsets;  // of its documents, as for push
    Bound largest;           // of its rows
    // the first row of a document, and the document of a row
    int64_t row_of(int64_t document) const { return offsets == nullptr ? document : offsets[document] - offsets[0]; }
    int64_t document_of(int64_t row) const {
      if (offsets == nullptr) return row;
      return std::upper_bound(offsets, offsets + documents + 1, offsets[0] + row) - offsets - 1;
    }
  };
  // A document that waits for its float64 score. `place`: in the lists of its batch, one after the other.
  struct Waiting {
    int32_t column, row, place;
  };
  struct Scratch {
    std::vector<float> rows;
    float* strip;
    std::vector<float> least;
    std::vector<int32_t> next;     // of each document, where the next pair with it goes
    std::vector<Waiting> waiting;  // by document
    std::vector<double> scores;    // by place
    std::vector<ExcludedPair> excluded;
  };
  struct Operand {
    double norm, size, residual;
    bool finite;
    bool usable() const { return finite && size <= kLargestNorm; }
  };
  static constexpr int kLargestPanel = 64;      // rows; no level has a larger tile
  static constexpr int64_t kBatch = 1 << 15;    // documents of all lists that are rescored at a time, or a list more
  static constexpr int64_t kSlack = 16;         // the kernels append up to a vector beyond
  static constexpr double kLargestNorm = 1e18;  // beyond it, a product of two rows could overflow float32
  using PackPanel = decltype(ScreenKernels::pack_a);

  void pack(const Rows& rows, int64_t count, PackPanel pack, char* panel, Scratch& scratch, Operand* operands) const;
  Status pack_documents(Block& block);
  int64_t tasks_of_runs() const;
  void screen(int64_t panel, int64_t start, const Block& block, Scratch& scratch);
  void run(int64_t panel, int64_t start, int64_t turn, const Block& block, Scratch& scratch);
  static int64_t fold(float* scores, int64_t start, int64_t columns, int64_t document, const Block& block, float& open);

  template <class Mark>
  void for_each_excluded(int64_t row, int64_t first_id, int64_t count, const Mark& mark);

  // core/band_settle.cc
  void set_thresholds(int64_t row, const Bound& largest);
  void make_room(int64_t row, const Block& block, Scratch& scratch);
  void settle(int64_t first_row, int64_t last_row, const Block& block, Scratch& scratch);
  void look_through(int64_t row, const Block& block, Scratch& scratch);
  void raise_worst(int64_t row, Scratch& scratch);
  void rescore(int64_t first_row, int64_t last_row, const Block& block, Scratch& scratch);
  void take(int64_t row, const Hit& hit);
  double exact(int64_t row, int64_t column, const Block& block, float* converted) const;
  void prefetch_hits(int64_t row) const;
  void prefetch(int64_t column, const Block& block) const;
  bool is_lucky(int64_t row, int64_t id) const;
  static uint64_t hash(const Query& query, int64_t id);

  const BandSpec spec_;
  const Kernels& kernels_;
  const ScreenKernels& screen_;
  const Plan plan_;
  const int64_t first_, rows_;
  const double* const hi_;
  const Ragged exclude_;
  // what a query needs lies apart from what the next one needs: in small pages, each access would miss the TLB
  WorkArray<float> queries_;           // (rows, d)
  std::vector<Query> state_;           // (rows)
  std::vector<BandList> lists_;        // (rows, padded to whole panels)
  WorkArray<Hit> hits_, drawn_;        // (rows, kept) heaps by score, (rows, drawn) by hash
  WorkArray<int32_t> waiting_column_;  // (rows, waiting)
  WorkArray<float> waiting_score_;
  Buffer<Bound> bounds_;  // (block) of documents; of rows while they are packed
  Buffer<double> norms_;  // (block) of rows, with normalize
  WorkBuffer packed_queries_, packed_documents_;
  Buffer<float> strips_;          // per thread, scores
  std::vector<Scratch> scratch_;  // per thread
};

}  // namespace refine_fast
