// info_nce in bf16 without stored scores (kernels/fused_loss_kernels.h).
//
// A panel of 32 rows meets a chunk of up to 256 columns in two matrix products:
//     S = rows columns^T     one 32 x 32 tile after the other: width / 32 steps of 4 TDPBF16PS
//     sums += E columns      one block of 32 of the width after the other: columns / 32 steps
// Both are bound by their streaming operand, which comes from L2 while the other one stays in L1. TDPBF16PS on one core
// of a Xeon with AMX, GFLOP/s: 3,400 with operands in tiles, 2,500 streaming from L2, 2,300 with a tile's stores every
// 12 steps, 930 streaming from L3; the two passes of B = 8,192 reach 1,370 at width 384, 1,190 at 768. Hence, each
// tried there (seconds of both passes at width 384):
//   - The streaming operand is loaded by TILELOADDT1, which spares L1: .147 instead of .166.
//   - Rows wider than 384 are multiplied in slices, so that the panel's slice stays in L1; the scores wait in L2.
//   - The exponentials of a tile run between the multiplications of the next one, and cost nothing.
//   - A block's products start from zero and are added to `sums` between the multiplications of the next block: .138
//     instead of .153 with `sums` loaded and stored as tiles, which stalls at both ends.
//   - Software prefetches of the next chunk, into L1 or L2, gained nothing within the noise.
//   - Results that become denormal cost an assist each (tau = .003: seven times the time), so they are flushed.
#pragma once
#include <immintrin.h>

#include "isa/amx_tiles.h"
#include "kernels/fused_loss_kernels.h"

namespace refine_fast {
namespace {

constexpr int kMaxColumns = 256, kTileFloats = kMr * kNr, kDepth = 384;
// A sum of weights of a row and chunk beyond it raises the row's shift. Far from the ends of the exponent: a row's
// smaller weights keep their digits, and sums of millions of weights do not overflow.
constexpr float kLargestSum = 0x1p60f;
constexpr float kLowest = -127.0f;  // of y: 2^-127 is flushed to 0

// Denormal results and operands are zeros while it lives.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// 2^y for y >= -127, as 2^floor(y) times a minimax polynomial of the rest. Relative error: 1.5e-7 with degree 5; 7.5e-5
// with degree 3, a 25th of the rounding to bf16.
template <int kDegree>
inline __m512 exp2(__m512 y) {
  const __m512 r = _mm512_reduce_ps(y, 0x09);
  __m512 p;
  if constexpr (kDegree == 5) {
    p = _mm512_set1_ps(0x1.ec320ap-10f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.26900cp-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c95446p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebd5a8p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e4f6p-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffep-1f));
  } else {
    p = _mm512_set1_ps(0x1.3f96a4p-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.cefc4cp-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.64444cp-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fff632p-1f));
  }
  return _mm512_scalef_ps(p, y);
}

inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// --- weights: of one row of a tile of scores -----------------------------------------------------

// NaN stays NaN: vmaxps returns its second operand then.
template <bool kNormalize>
inline __m512 exponent(const float* s, __m512 norm, __m512 k, __m512 b) {
  __m512 x = _mm512_load_ps(s);
  if constexpr (kNormalize) x = _mm512_mul_ps(x, norm);
  return _mm512_max_ps(_mm512_set1_ps(kLowest), _mm512_fmadd_ps(x, k, b));
}

template <bool kNormalize, bool kMargin>
struct QueryWeights {
  const QueryTerms& t;
  float ceiling[kMr];                                           // of y
  alignas(64) float total[kMr][16] = {}, moment[kMr][16] = {};  // of the chunk, by lanes

  explicit QueryWeights(const QueryTerms& terms) : t(terms) {
    for (int r = 0; r < kMr && kMargin; ++r) ceiling[r] = __builtin_fmaf(t.positive[r], t.k[r], t.b[r]) + t.margin;
  }

  __m512 y(int r, const float* s, int column) const {
    __m512 norm;
    if constexpr (kNormalize) norm = _mm512_loadu_ps(t.norms + column);
    return exponent<kNormalize>(s, norm, _mm512_set1_ps(t.k[r]), _mm512_set1_ps(t.b[r]));
  }

  __mmask16 counted(int r, __m512 y) const {
    if constexpr (!kMargin) return 0xffff;
    return _mm512_cmp_ps_mask(y, _mm512_set1_ps(ceiling[r]), _CMP_NGT_UQ);  // and NaN
  }

  // Row r of the tile s, whose first column is `column`.
  void row(int r, const float* s, int column, uint16_t* out) {
    __m512 e[2], sum = _mm512_load_ps(total[r]), weighted = _mm512_load_ps(moment[r]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 z = y(r, s + r * kNr + 16 * h, column + 16 * h);
      e[h] = exp2<5>(z);
      if constexpr (kMargin) e[h] = _mm512_maskz_mov_ps(counted(r, z), e[h]);
      sum = _mm512_add_ps(sum, e[h]);
      weighted = _mm512_fmadd_ps(e[h], z, weighted);
      if constexpr (kNormalize) e[h] = _mm512_mul_ps(e[h], _mm512_loadu_ps(t.norms + column + 16 * h));
    }
    _mm512_store_ps(total[r], sum);
    _mm512_store_ps(moment[r], weighted);
    _mm512_store_si512(out + r * kNr, to_bf16(e[0], e[1]));
  }

  bool is_small(int r) const {
    return _mm512_cmp_ps_mask(_mm512_load_ps(total[r]), _mm512_set1_ps(kLargestSum), _CMP_LE_OQ) == 0xffff;
  }
  bool all_small() const {
    for (int r = 0; r < kMr; ++r)
      if (!is_small(r)) return false;
    return true;
  }

  static void add_lanes(const float lanes[kMr][16], double* sums) {
    for (int r = 0; r < kMr; r += 16) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(lanes[r + i]);
      transpose16(words);
      __m512 sum = _mm512_castsi512_ps(words[0]);
#pragma GCC unroll 16
      for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(words[i]));
      double* out = sums + r;
      _mm512_storeu_pd(out, _mm512_add_pd(_mm512_loadu_pd(out), _mm512_cvtps_pd(_mm512_castps512_ps256(sum))));
      _mm512_storeu_pd(out + 8,
                       _mm512_add_pd(_mm512_loadu_pd(out + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1))));
    }
  }
  void finish() const {
    add_lanes(total, t.total);
    add_lanes(moment, t.moment);
  }
};

template <bool kNormalize, bool kMargin>
struct DocumentWeights {
  const DocumentTerms& t;

  void row(int r, const float* s, int column, uint16_t* out) {
    __m512 g[2], norm;
    if constexpr (kNormalize) norm = _mm512_set1_ps(t.norms[r]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int c = column + 16 * h;
      const __m512 y =
          exponent<kNormalize>(s + r * kNr + 16 * h, norm, _mm512_loadu_ps(t.k + c), _mm512_loadu_ps(t.b + c));
      g[h] = _mm512_mul_ps(exp2<3>(y), _mm512_loadu_ps(t.factor + c));
      if constexpr (kMargin)
        g[h] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_loadu_ps(t.ceiling + c), _CMP_NGT_UQ), g[h]);
    }
    _mm512_store_si512(out + r * kNr, to_bf16(g[0], g[1]));
  }
};

// --- products ------------------------------------------------------------------------------------

// Sums are kept tile by tile, each without gaps.
inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  fence();
}

int64_t padded(int64_t width) { return (width + kKr - 1) / kKr * kKr; }

// where `sums` has column c of a row
int64_t place(int64_t row, int64_t c) { return c / kNr * kTileFloats + row / 16 * 512 + c % kNr * 16 + row % 16 * 16; }

// Calls work(tile, row) for every row of every tile of scores but those of the last, whose rows follow at the end:
// tile t's while tile t + 1 is multiplied. scores has room for all tiles if the width is cut into slices, else for two.
template <class Work>
void multiply_scores(const FusedOperands& o, float* scores, const Work& work) {
  const int64_t tiles = (o.count + kNr - 1) / kNr, width = padded(o.width), slices = (width + kDepth - 1) / kDepth,
                depth = padded(width / slices);
  const auto tile = [&](int64_t t) { return scores + (slices > 1 ? t : t % 2) * kTileFloats; };
  const char *rows = static_cast<const char*>(o.rows), *columns = static_cast<const char*>(o.columns);
  const int32_t *excluded = o.excluded, *excluded_end = excluded + o.excluded_count;
  for (int64_t begin = 0; begin < width; begin += depth) {
    const int64_t steps = (width - begin < depth ? width - begin : depth) / kKr, share = (kMr + steps - 1) / steps;
    const bool last = begin + depth >= width;
    for (int64_t t = 0; t < tiles; ++t) {
      if (begin > 0)
        load_tiles(tile(t), kNr);
      else
        zero_tiles();
      const char *kept = rows + begin * 64, *streaming = columns + t * width * 64 + begin * 64;
      int64_t r = last && t > 0 ? 0 : kMr;
      for (int64_t p = 0; p < steps; ++p, kept += kStepBytes, streaming += kStepBytes)
        step<true>(kept, streaming, [&] {
          for (const int64_t end = r + share < kMr ? r + share : kMr; r < end; ++r)
            work(t - 1, static_cast<int>(r), tile(t - 1));
        });
      store_tiles(tile(t), kNr);
      if (!last) continue;
      for (; excluded < excluded_end && *excluded < (t + 1) * kTileFloats; ++excluded)
        tile(t)[*excluded - t * kTileFloats] = -__builtin_inff();
    }
  }
  for (int r = 0; r < kMr; ++r) work(tiles - 1, r, tile(tiles - 1));
  fence();
}

// sums += weights columns
void multiply_weights(const FusedOperands& o, const uint16_t* weights) {
  const int64_t tiles = (o.count + kNr - 1) / kNr, blocks = padded(o.width) / kNr, share = (64 + tiles - 1) / tiles;
  alignas(64) float products[2][kTileFloats];
  const char* streaming = static_cast<const char*>(o.products);
  for (int64_t block = 0; block <= blocks; ++block) {
    // the block before
    const float* from = products[(block + 1) % 2];
    float* to = o.sums + (block - 1) * kTileFloats;
    int64_t v = block > 0 ? 0 : 64;
    const auto add = [&] {
      for (const int64_t end = v + share < 64 ? v + share : 64; v < end; ++v)
        _mm512_store_ps(to + 16 * v, _mm512_add_ps(_mm512_load_ps(to + 16 * v), _mm512_load_ps(from + 16 * v)));
    };
    if (block == blocks) {
      while (v < 64) add();
      break;
    }
    zero_tiles();
    const char* kept = reinterpret_cast<const char*>(weights);
    for (int64_t t = 0; t < tiles; ++t, kept += kStepBytes, streaming += kStepBytes) step<true>(kept, streaming, add);
    store_sums(products[block % 2]);
  }
}

// --- the panel's pass ----------------------------------------------------------------------------

// Raises the shift of rows whose weights are too large, so that their largest becomes 1, with all that was summed for
// them. False if that cannot help: a score is not finite.
template <class Weights>
bool raise(const FusedOperands& o, const QueryTerms& t, const Weights& weights, float* scores) {
  float top[kMr];
  for (float& y : top) y = kLowest;
  multiply_scores(o, scores, [&](int64_t tile, int r, const float* s) {
    for (int h = 0; h < 2; ++h) {
      const __m512 y = weights.y(r, s + r * kNr + 16 * h, static_cast<int>(tile) * kNr + 16 * h);
      const float most = _mm512_mask_reduce_max_ps(weights.counted(r, y), y);
      if (most > top[r]) top[r] = most;
    }
  });
  for (int r = 0; r < kMr; ++r) {
    if (weights.is_small(r)) continue;
    if (!(top[r] > 0 && top[r] < 0x1p30f)) return false;
    const float by = static_cast<float>(static_cast<int32_t>(top[r]) + 1);
    const float scale =
        by < 127 ? _mm_cvtss_f32(_mm_castsi128_ps(_mm_set1_epi32((127 - static_cast<int32_t>(by)) << 23))) : 0;
    t.b[r] -= by;
    t.moment[r] = (t.moment[r] - by * t.total[r]) * scale, t.total[r] *= scale;
    for (int64_t c = 0; o.sums != nullptr && c < padded(o.width); c += 16) {
      float* sums = o.sums + place(r, c);
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(scale)));
    }
  }
  return true;
}

template <bool kNormalize, bool kMargin>
void queries(const FusedOperands& o, const QueryTerms& terms) {
  const FlushDenormals flush;
  alignas(64) float scores[kMaxColumns * kMr];
  alignas(64) uint16_t weights[kMaxColumns * kMr];
  for (;;) {
    QueryWeights<kNormalize, kMargin> query(terms);
    multiply_scores(o, scores, [&](int64_t tile, int r, const float* s) {
      query.row(r, s, static_cast<int>(tile) * kNr, weights + tile * kTileFloats);
    });
    if (query.all_small() || !raise(o, terms, query, scores)) {
      query.finish();
      break;
    }
  }
  if (o.sums != nullptr) multiply_weights(o, weights);
}

template <bool kNormalize, bool kMargin>
void documents(const FusedOperands& o, const DocumentTerms& terms) {
  const FlushDenormals flush;
  alignas(64) float scores[kMaxColumns * kMr];
  alignas(64) uint16_t weights[kMaxColumns * kMr];
  DocumentWeights<kNormalize, kMargin> document{terms};
  multiply_scores(o, scores, [&](int64_t tile, int r, const float* s) {
    document.row(r, s, static_cast<int>(tile) * kNr, weights + tile * kTileFloats);
  });
  multiply_weights(o, weights);
}

void any_queries(const FusedOperands& o, const QueryTerms& t) {
  const bool margin = t.margin < __builtin_inff();
  const auto pass = t.norms != nullptr ? (margin ? queries<true, true> : queries<true, false>)
                                       : (margin ? queries<false, true> : queries<false, false>);
  pass(o, t);
}

void any_documents(const FusedOperands& o, const DocumentTerms& t) {
  const auto pass = t.norms != nullptr ? (t.ceiling != nullptr ? documents<true, true> : documents<true, false>)
                                       : (t.ceiling != nullptr ? documents<false, true> : documents<false, false>);
  pass(o, t);
}

// --- operands and sums ---------------------------------------------------------------------------

void pack_rows(const uint16_t* src, int64_t stride, int64_t rows, int64_t width, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int64_t p = 0; p < width; p += kKr)
    for (int64_t r = 0; r < kMr; ++r, out += 64) {
      const __mmask32 within = width - p >= kKr ? 0xffffffffu : (1u << (width - p)) - 1u;
      _mm512_store_si512(out, _mm512_maskz_loadu_epi16(r < rows ? within : 0, src + r * stride + p));
    }
}

void pack_columns(const uint16_t* src, int64_t stride, int64_t columns, int64_t width, void* panel) {
  pack_panel_words<kNr, kKr>(src, stride, 1, columns, width, panel);
}

void pack_products(const uint16_t* src, int64_t stride, int64_t columns, int64_t width, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int64_t c = 0; c < width; c += kNr, out += padded(columns) * kNr * 2)
    pack_panel_words<kNr, kKr>(src + c, 1, stride, width - c, columns, out);
}

void score_pairs(const void* rows, const void* columns, int64_t width, float* scores) {
  alignas(64) float tile[kTileFloats];
  const char *kept = static_cast<const char*>(rows), *streaming = static_cast<const char*>(columns);
  for (int64_t p = 0; p < width; p += kKr, kept += kStepBytes, streaming += kStepBytes) {
    // as multiply_scores, which leaves tiles 0-3 between its slices: the same bits
    if (p == 0) zero_tiles();
    step<true>(kept, streaming, [] {});
  }
  store_tiles(tile, kNr);
  for (int r = 0; r < kMr; ++r) scores[r] = tile[r * kNr + r];
}

void read_sums(const float* sums, int64_t row, int64_t width, float factor, float* out) {
  for (int64_t c = 0; c < width; c += 16)
    _mm512_mask_storeu_ps(out + c, first(width - c),
                          _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(sums + place(row, c))));
}

void write_sums(const float* values, int64_t row, int64_t width, float* sums) {
  for (int64_t c = 0; c < width; c += 16)
    _mm512_store_ps(sums + place(row, c), _mm512_maskz_loadu_ps(first(width - c), values + c));
}

const FusedLossKernels fused_loss = {
    .rows = kMr,
    .max_columns = kMaxColumns,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .pack_products = pack_products,
    .score_pairs = score_pairs,
    .queries = any_queries,
    .documents = any_documents,
    .read_sums = read_sums,
    .write_sums = write_sums,
    .begin_tiles = begin_tiles,
    .end_tiles = end_tiles,
};

}  // namespace
}  // namespace refine_fast
