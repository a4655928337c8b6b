// info_nce in bf16 without stored scores (kernels/fused_loss_kernels.h).
//
// A panel of 32 rows meets a chunk of up to 256 columns in two matrix products:
//     S^T = columns rows^T   one 32 x 32 tile after the other: width / 32 steps of 4 TDPBF16PS
//     sums += E columns      one block of 32 of the width after the other: columns / 32 steps
// Both are bound by their streaming operand, which comes from L2 while the other one stays in L1. TDPBF16PS on one core
// of a Xeon with AMX, GFLOP/s: 3,400 with operands in tiles, 2,500 streaming from L2, 2,300 with a tile's stores every
// 12 steps, 930 streaming from L3; the two passes of B = 8,192 reach 1,550 at width 384, 1,370 at 768. Hence, each
// tried there (seconds of both passes):
//   - The scores are made transposed, so that the columns are their left operand: a line of it is a piece of a row, and
//     from two such lines the pairs that the second product wants follow by shifts. One layout comes from L3, and the
//     other is made of it in L2 once a task and chunk: .292 instead of .336 at width 768 with both layouts in L3, more
//     where others use L3; at 384 as before. Rows straight from the caller, not in the tiles' order, cost .337: their
//     small pages miss the TLB, and a tile loaded at a row's pitch takes 1.6 times as long.
//   - The streaming operand is loaded by TILELOADDT1, which spares L1: .147 instead of .166 at width 384.
//   - Rows wider than 384 are multiplied in slices, so that the panel's slice stays in L1; the scores wait in L2.
//   - The exponentials of a tile, and the transposition of its weights, run between the multiplications of the next
//     one, evenly: .153 instead of .166 in bursts, at 384.
//   - A block's products start from zero and are added to `sums` between the multiplications of the next block: .138
//     instead of .153 with `sums` loaded and stored as tiles, which stalls at both ends.
//   - Software prefetches of the next chunk, into L1 or L2, take from the tile loads what they save.
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

// --- weights: of one unit of a tile of scores ----------------------------------------------------

// A tile has a line for each column and a lane for each row of the panel. A unit is a quarter of 16 lines, in pairs
// that are 16 lines apart, and 16 lanes. The weights leave as the left operand of `sums`: a line for each row of the
// panel, word i with the columns i and i + 16, an order of k that needs no shuffle on the other side.
constexpr unsigned kUnits = 16, kPairsOfUnit = 2;

// NaN stays NaN: vmaxps returns its second operand then.
template <bool kNormalize>
inline __m512 exponent(const float* s, __m512 norm, __m512 k, __m512 b) {
  __m512 x = _mm512_load_ps(s);
  if constexpr (kNormalize) x = _mm512_mul_ps(x, norm);
  return _mm512_max_ps(_mm512_set1_ps(kLowest), _mm512_fmadd_ps(x, k, b));
}

// The weights of a tile on their way from lines to lanes.
class Transposition {
 public:
  // of the columns i and i + 16
  void put(unsigned i, __m512 first, __m512 second) {
    _mm512_store_si512(lines_[i], (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  // A line for each lane. Its columns are in the order 0-7, 16-23, 8-15, 24-31.
  void finish(uint16_t* out) const {
    __m512i x[16], y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      const __m512i u = _mm512_load_si512(lines_[i]), v = _mm512_load_si512(lines_[i + 1]);
      x[i] = _mm512_unpacklo_epi16(u, v), x[i + 1] = _mm512_unpackhi_epi16(u, v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        y[i + 2 * h] = _mm512_unpacklo_epi32(x[i + h], x[i + 2 + h]);
        y[i + 2 * h + 1] = _mm512_unpackhi_epi32(x[i + h], x[i + 2 + h]);
      }
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) {
        x[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + 4 + h]);
        x[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + 4 + h]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm512_store_si512(out + i * 32, _mm512_shuffle_i32x4(x[i], x[i + 8], 0x88));
      _mm512_store_si512(out + (i + 8) * 32, _mm512_shuffle_i32x4(x[i], x[i + 8], 0xdd));
    }
  }

 private:
  alignas(64) uint16_t lines_[16][32];
};

template <bool kNormalize, bool kMargin>
struct QueryWeights {
  const QueryTerms& t;
  alignas(64) float ceiling[kMr];                       // of y
  alignas(64) float total[kMr] = {}, moment[kMr] = {};  // of the chunk
  alignas(64) float tile_total[16], tile_moment[16];    // of the tile's lanes at hand: short sums round less
  Transposition words;

  explicit QueryWeights(const QueryTerms& terms) : t(terms) {
    for (int r = 0; r < kMr && kMargin; ++r) ceiling[r] = __builtin_fmaf(t.positive[r], t.k[r], t.b[r]) + t.margin;
  }

  // of the rows from `lane` on with one column
  __m512 y(unsigned lane, const float* s, unsigned column) const {
    return exponent<kNormalize>(s + lane, norm(column), _mm512_loadu_ps(t.k + lane), _mm512_loadu_ps(t.b + lane));
  }
  __m512 norm(unsigned column) const {
    if constexpr (!kNormalize) return _mm512_set1_ps(1);
    return _mm512_set1_ps(t.norms[column]);
  }

  __mmask16 counted(unsigned lane, __m512 y) const {
    if constexpr (!kMargin) return 0xffff;
    return _mm512_cmp_ps_mask(y, _mm512_load_ps(ceiling + lane), _CMP_NGT_UQ);  // and NaN
  }

  // Unit `unit` of the tile s, whose first column is `column`.
  void work(unsigned unit, const float* s, unsigned column, uint16_t* out) {
    const unsigned lane = unit / 8 * 16;
    const bool first = unit % 8 == 0;
    __m512 sum = first ? _mm512_setzero_ps() : _mm512_load_ps(tile_total);
    __m512 weighted = first ? _mm512_setzero_ps() : _mm512_load_ps(tile_moment);
#pragma GCC unroll 2
    for (unsigned p = 0; p < kPairsOfUnit; ++p) {
      const unsigned i = unit % 8 * kPairsOfUnit + p;
      __m512 e[2], z[2];
#pragma GCC unroll 2
      for (unsigned h = 0; h < 2; ++h) {
        z[h] = y(lane, s + (i + 16 * h) * kNr, column + i + 16 * h);
        e[h] = exp2<5>(z[h]);
        if constexpr (kMargin) e[h] = _mm512_maskz_mov_ps(counted(lane, z[h]), e[h]);
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(e[0], e[1]));
      weighted = _mm512_fmadd_ps(e[0], z[0], _mm512_fmadd_ps(e[1], z[1], weighted));
      if constexpr (kNormalize)
        for (unsigned h = 0; h < 2; ++h) e[h] = _mm512_mul_ps(e[h], norm(column + i + 16 * h));
      words.put(i, e[0], e[1]);
    }
    if (unit % 8 < 7) {
      _mm512_store_ps(tile_total, sum), _mm512_store_ps(tile_moment, weighted);
      return;
    }
    _mm512_store_ps(total + lane, _mm512_add_ps(_mm512_load_ps(total + lane), sum));
    _mm512_store_ps(moment + lane, _mm512_add_ps(_mm512_load_ps(moment + lane), weighted));
    words.finish(out + lane * kNr);
  }

  // a bit for each row
  uint32_t large() const {
    const __m512 most = _mm512_set1_ps(kLargestSum);
    return _mm512_cmp_ps_mask(_mm512_load_ps(total), most, _CMP_NLE_UQ) |
           static_cast<uint32_t>(_mm512_cmp_ps_mask(_mm512_load_ps(total + 16), most, _CMP_NLE_UQ)) << 16;
  }

  static void add(const float* sums, double* to) {
    for (int r = 0; r < kMr; r += 8)
      _mm512_storeu_pd(to + r, _mm512_add_pd(_mm512_loadu_pd(to + r), _mm512_cvtps_pd(_mm256_load_ps(sums + r))));
  }
  void finish() const {
    add(total, t.total);
    add(moment, t.moment);
  }
};

template <bool kNormalize, bool kMargin>
struct DocumentWeights {
  const DocumentTerms& t;
  Transposition words;

  void work(unsigned unit, const float* s, unsigned column, uint16_t* out) {
    const unsigned lane = unit / 8 * 16;
    __m512 norm;
    if constexpr (kNormalize) norm = _mm512_loadu_ps(t.norms + lane);
#pragma GCC unroll 2
    for (unsigned p = 0; p < kPairsOfUnit; ++p) {
      const unsigned i = unit % 8 * kPairsOfUnit + p;
      __m512 g[2];
#pragma GCC unroll 2
      for (unsigned h = 0; h < 2; ++h) {
        const unsigned line = i + 16 * h, c = column + line;
        const __m512 y =
            exponent<kNormalize>(s + line * kNr + lane, norm, _mm512_set1_ps(t.k[c]), _mm512_set1_ps(t.b[c]));
        g[h] = _mm512_mul_ps(exp2<3>(y), _mm512_set1_ps(t.factor[c]));
        if constexpr (kMargin)
          g[h] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(t.ceiling[c]), _CMP_NGT_UQ), g[h]);
      }
      words.put(i, g[0], g[1]);
    }
    if (unit % 8 == 7) words.finish(out + lane * kNr);
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

// where `sums` has the even columns c .. c + 30 of a row, for c a multiple of 32; the odd ones are kOdd further
int64_t place(int64_t row, int64_t c) { return c / kNr * kTileFloats + row / 16 * 512 + row % 16 * 16; }
constexpr int64_t kOdd = 256;

// Calls work(tile, unit) for every unit of every tile of scores: tile t's while tile t + 1 is multiplied, the last
// one's at the end. scores has room for all tiles if the width is cut into slices, else for two.
template <class Work>
void multiply_scores(const FusedOperands& o, float* scores, const Work& work) {
  const int64_t tiles = (o.count + kNr - 1) / kNr, width = padded(o.width), slices = (width + kDepth - 1) / kDepth,
                depth = padded(width / slices);
  const auto tile = [&](int64_t t) { return scores + (slices > 1 ? t : t % 2) * kTileFloats; };
  const char *rows = static_cast<const char*>(o.rows), *columns = static_cast<const char*>(o.columns);
  const int32_t *excluded = o.excluded, *excluded_end = excluded + o.excluded_count;
  for (int64_t begin = 0; begin < width; begin += depth) {
    const int64_t steps = (width - begin < depth ? width - begin : depth) / kKr;
    const bool last = begin + depth >= width;
    for (int64_t t = 0; t < tiles; ++t) {
      if (begin > 0)
        load_tiles(tile(t), kNr);
      else
        zero_tiles();
      const char *kept = rows + begin * 64, *streaming = columns + t * width * 64 + begin * 64;
      unsigned unit = last && t > 0 ? 0 : kUnits, due = 0;  // kUnits over the steps
      for (int64_t p = 0; p < steps; ++p, kept += kStepBytes, streaming += kStepBytes)
        step<Streaming::a>(streaming, kept, [&] {
          for (due += kUnits; due >= steps && unit < kUnits; due -= steps, ++unit) work(t - 1, unit, tile(t - 1));
        });
      store_tiles(tile(t), kNr);
      if (!last) continue;
      for (; excluded < excluded_end && *excluded < (t + 1) * kTileFloats; ++excluded)
        tile(t)[*excluded - t * kTileFloats] = -__builtin_inff();
    }
  }
  for (unsigned unit = 0; unit < kUnits; ++unit) work(tiles - 1, unit, tile(tiles - 1));
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
    for (int64_t t = 0; t < tiles; ++t, kept += kStepBytes, streaming += kStepBytes)
      step<Streaming::b>(kept, streaming, add);
    store_sums(products[block % 2]);
  }
}

// --- the panel's pass ----------------------------------------------------------------------------

// Raises the shift of rows whose weights are too large, so that their largest becomes 1, with all that was summed for
// them. False if that cannot help: a score is not finite.
template <class Weights>
bool raise(const FusedOperands& o, const QueryTerms& t, const Weights& weights, float* scores) {
  alignas(64) float top[kMr];
  for (float& y : top) y = kLowest;
  multiply_scores(o, scores, [&](unsigned tile, unsigned unit, const float* s) {
    const unsigned lane = unit / 8 * 16;
    __m512 most = _mm512_load_ps(top + lane);
    for (unsigned i = unit % 8 * 4; i < unit % 8 * 4 + 4; ++i) {
      const __m512 y = weights.y(lane, s + i * kNr, tile * kNr + i);
      most = _mm512_mask_max_ps(most, weights.counted(lane, y), most, y);
    }
    _mm512_store_ps(top + lane, most);
  });
  for (uint32_t large = weights.large(); large != 0; large &= large - 1) {
    const int r = __builtin_ctz(large);
    if (!(top[r] > 0 && top[r] < 0x1p30f)) return false;
    const float by = static_cast<float>(static_cast<int32_t>(top[r]) + 1);
    const float scale =
        by < 127 ? _mm_cvtss_f32(_mm_castsi128_ps(_mm_set1_epi32((127 - static_cast<int32_t>(by)) << 23))) : 0;
    t.b[r] -= by;
    t.moment[r] = (t.moment[r] - by * t.total[r]) * scale, t.total[r] *= scale;
    for (int64_t c = 0; o.sums != nullptr && c < padded(o.width); c += 32)
      for (int64_t odd = 0; odd <= kOdd; odd += kOdd) {
        float* sums = o.sums + place(r, c) + odd;
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
    multiply_scores(o, scores, [&](unsigned tile, unsigned unit, const float* s) {
      query.work(unit, s, tile * kNr, weights + tile * kTileFloats);
    });
    if (query.large() == 0 || !raise(o, terms, query, scores)) {
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
  DocumentWeights<kNormalize, kMargin> document{terms, {}};
  multiply_scores(o, scores, [&](unsigned tile, unsigned unit, const float* s) {
    document.work(unit, s, tile * kNr, weights + tile * kTileFloats);
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
  pack_panel_words<kNr, kKr>(src, stride, 1, rows, width, panel);
}

// For every 32 of the width, a line for each of 32 columns.
void pack_columns(const uint16_t* src, int64_t stride, int64_t columns, int64_t width, void* panel) {
  char* out = static_cast<char*>(panel);
  for (int64_t p = 0; p < width; p += kKr)
    for (int64_t c = 0; c < kNr; ++c, out += 64) {
      const __mmask32 within = width - p >= kKr ? 0xffffffffu : (1u << (width - p)) - 1u;
      _mm512_store_si512(out, _mm512_maskz_loadu_epi16(c < columns ? within : 0, src + c * stride + p));
    }
}

// For every 32 of the width and of the columns, lines of words that pair two columns, in the order of a line of
// weights: first the even places of the width, then the odd ones.
void pair_columns(const void* columns, int64_t count, int64_t width, void* products) {
  const int64_t tiles = (count + kNr - 1) / kNr, steps = padded(width) / kKr;
  const __m512i upper = _mm512_set1_epi32(~0xffff);
  const char* from = static_cast<const char*>(columns);
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t p = 0; p < steps; ++p, from += kStepBytes) {
      char* out = static_cast<char*>(products) + (p * tiles + t) * kStepBytes;
#pragma GCC unroll 4
      for (int64_t i = 0; i < 16; ++i, out += 128) {
        const int64_t column = 2 * (i < 4 || i >= 12 ? i : i < 8 ? i + 4 : i - 4);
        const __m512i x = _mm512_load_si512(from + column * 64), y = _mm512_load_si512(from + column * 64 + 64);
        _mm512_store_si512(out, _mm512_or_si512(_mm512_andnot_si512(upper, x), _mm512_slli_epi32(y, 16)));
        _mm512_store_si512(out + 64, _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_and_si512(upper, y)));
      }
    }
}

void score_pairs(const void* rows, const void* columns, int64_t width, float* scores) {
  alignas(64) float tile[kTileFloats];
  const char *kept = static_cast<const char*>(rows), *streaming = static_cast<const char*>(columns);
  for (int64_t p = 0; p < width; p += kKr, kept += kStepBytes, streaming += kStepBytes) {
    // as multiply_scores, which leaves tiles 0-3 between its slices: the same bits
    if (p == 0) zero_tiles();
    step<Streaming::a>(streaming, kept, [] {});
  }
  store_tiles(tile, kNr);
  for (int r = 0; r < kMr; ++r) scores[r] = tile[r * kNr + r];
}

void read_sums(const float* sums, int64_t row, int64_t width, float factor, float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < width; c += 32) {
    const float* from = sums + place(row, c);
    const __m512 even = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(from)),
                 odd = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(from + kOdd));
    _mm512_mask_storeu_ps(out + c, first(width - c), _mm512_permutex2var_ps(even, low, odd));
    _mm512_mask_storeu_ps(out + c + 16, first(width - c - 16), _mm512_permutex2var_ps(even, high, odd));
  }
}

void write_sums(const float* values, int64_t row, int64_t width, float* sums) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t c = 0; c < width; c += 32) {
    const __m512 x = _mm512_maskz_loadu_ps(first(width - c), values + c),
                 y = _mm512_maskz_loadu_ps(first(width - c - 16), values + c + 16);
    _mm512_store_ps(sums + place(row, c), _mm512_permutex2var_ps(x, even, y));
    _mm512_store_ps(sums + place(row, c) + kOdd, _mm512_permutex2var_ps(x, odd, y));
  }
}

const FusedLossKernels fused_loss = {
    .rows = kMr,
    .max_columns = kMaxColumns,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .pair_columns = pair_columns,
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
