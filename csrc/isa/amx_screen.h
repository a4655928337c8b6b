// The screen of the AMX level: the tiles' product of rows rounded to bf16. Other tile formats have too few digits for a
// narrow margin.
#pragma once
#include "isa/amx_tiles.h"
#include "kernels/screen_kernels.h"
#include "kernels/select_kernels.h"

namespace refine_fast {
namespace {

template <auto kPack>
void screen_pack(const float* rows, int64_t stride, int64_t count, int64_t d, const double*, void* panel,
                 double* residuals) {
  for (int64_t r = 0; r < count; ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < d; p += 16) {
      const __m512 x = load_floats(rows + r * stride + p, 1, d - p);
      const __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
      const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(rounded));  // exact: both lie within a factor of two
      sum = _mm512_fmadd_ps(left, left, sum);
    }
    // 2^-126: for squares that underflow, in a row below 1e-16
    residuals[r] = _mm512_reduce_add_ps(sum) + static_cast<double>(d) * 0x1p-126;
  }
  kPack(rows, stride, 1, count, d, panel);
}

void screen_tile(const void* a, const void* b, int64_t d, float* scores, int64_t ld) {
  tile(a, b, d, scores, ld, false);
}

// --- run -----------------------------------------------------------------------------------------

constexpr int64_t kTile = kMr * kNr;
// of k: 32 KB of the panel of queries, two thirds of L1, which the documents' panels stream past
constexpr int64_t kStationary = 16;
// Scores of a panel in L1: two tiles, or four whose sums over k are taken in several shares.
constexpr int64_t kSums = 4;

// A tile of scores and what became of them.
struct Compared {
  float* scores;
  const BandList* lists;
  int64_t column;
  uint32_t chosen[kMr];  // of each row, the scores that a list may want
};

// SelectKernels::append for one row, but for the appending: returns which scores are to be.
uint32_t compare(Compared& tile, int64_t row, int32_t* counted) {
  const BandThresholds& t = tile.lists[row].thresholds;
  const __m512 floor = _mm512_set1_ps(t.floor), sure = _mm512_set1_ps(t.sure), keep = _mm512_set1_ps(t.keep),
               ceil = _mm512_set1_ps(t.ceil);
  __mmask16 chosen[2], between[2];
  for (int v = 0; v < 2; ++v) {
    const __m512 s = _mm512_load_ps(tile.scores + row * kNr + 16 * v);
    between[v] = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(s, sure, _CMP_GE_OQ), s, keep, _CMP_LT_OQ);
    const __mmask16 within = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(s, ceil, _CMP_LE_OQ), s, floor, _CMP_GE_OQ);
    chosen[v] = _kandn_mask16(between[v], within);
  }
  counted[row] += __builtin_popcount(_cvtmask32_u32(_mm512_kunpackw(between[1], between[0])));
  return tile.chosen[row] = _cvtmask32_u32(_mm512_kunpackw(chosen[1], chosen[0]));
}

// c = (c +) a b over `steps` of k. Between the multiplications, the scores of the tile before are compared; returns
// which of its rows have none chosen, the first as the highest bit. Done early: what is appended then runs beside the
// last multiplications.
template <bool kCompare>
uint32_t multiply(const char* a, const char* b, int64_t steps, float* c, bool accumulate, Compared& before,
                  int32_t* counted, const char* ahead) {
  if (accumulate)
    load_tiles(c, kNr);
  else
    zero_tiles();
  const int64_t early = steps - steps / 4, share = (kMr + early - 1) / early;
  int64_t row = 0;
  uint32_t none = 0;
  for (int64_t p = 0; p < steps; ++p, a += kStepBytes, b += kStepBytes, ahead += 128) {
    step<Streaming::b>(a, b, [] {});
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    if (kCompare)
      for (int64_t i = 0; i < share && row < kMr; ++i) none = 2 * none + (compare(before, row++, counted) == 0);
  }
  store_tiles(c, kNr);
  return none;
}

// Appends the chosen scores of a tile. One branch for all its rows: a branch for each would cost a tenth of the
// product.
void append_tile(const ScreenRun& run, const Compared& tile, uint32_t none) {
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (uint32_t rows = ~none; rows != 0;) {
    const int row = __builtin_clz(rows);
    rows &= ~(0x80000000u >> row);
    BandList& list = run.lists[row];
    if (list.size + kNr + 16 > run.room) run.full(run.context, row);
    int64_t size = list.size;
    for (int v = 0; v < 2; ++v) {
      const __m512 s = _mm512_load_ps(tile.scores + row * kNr + 16 * v);
      const __mmask16 chosen = static_cast<__mmask16>(tile.chosen[row] >> (16 * v));
      const __m512i index =
          _mm512_add_epi32(iota, _mm512_set1_epi32(run.first + static_cast<int32_t>(tile.column) + 16 * v));
      _mm512_storeu_ps(list.score + size, _mm512_maskz_compress_ps(chosen, s));
      _mm512_storeu_si512(list.index + size, _mm512_maskz_compress_epi32(chosen, index));
      size += __builtin_popcount(chosen);
    }
    list.size = size;
  }
}

// Tile by tile, with a panel of queries of up to 32 KB in L1, the documents streaming from L2. Deeper panels are
// multiplied in equal shares, each with four panels of documents.
void screen_run(const ScreenRun& run) {
  const int64_t steps = (run.d + kKr - 1) / kKr, shares = (steps + kStationary - 1) / kStationary;
  const int64_t share = (steps + shares - 1) / shares, tiles = (run.columns + kNr - 1) / kNr;
  const int64_t group = shares > 1 ? kSums : 2;
  const char *a = static_cast<const char*>(run.a), *b = static_cast<const char*>(run.b), *ahead = run.ahead;
  const ExcludedPair* excluded = run.excluded;
  int32_t counted[kMr] = {};
  Compared before;
  before.scores = nullptr, before.lists = run.lists;
  for (int64_t first = 0; first < tiles; first += group)
    for (int64_t begin = 0; begin < steps; begin += share) {
      const int64_t end = begin + share < steps ? begin + share : steps;
      for (int64_t j = first; j < first + group && j < tiles; ++j, ahead += 128 * (end - begin)) {
        float* const scores = run.scores + (j - first) * kTile;
        const char *pa = a + begin * kStepBytes, *pb = b + (j * steps + begin) * kStepBytes;
        if (before.scores != nullptr) {
          const uint32_t none = multiply<true>(pa, pb, end - begin, scores, begin > 0, before, counted, ahead);
          append_tile(run, before, none);
          before.scores = nullptr;
        } else {
          multiply<false>(pa, pb, end - begin, scores, begin > 0, before, counted, ahead);
        }
        if (end < steps) continue;
        before.scores = scores, before.column = j * kNr;
        for (; excluded->column < (j + 1) * kNr; ++excluded)
          scores[excluded->row * kNr + excluded->column - j * kNr] = __builtin_nanf("");
      }
    }
  uint32_t none = 0;
  for (int64_t row = 0; row < kMr; ++row) {
    for (int64_t column = run.columns - before.column; column < kNr; ++column)
      before.scores[row * kNr + column] = __builtin_nanf("");
    none = 2 * none + (compare(before, row, counted) == 0);
  }
  append_tile(run, before, none);
  for (int64_t row = 0; row < kMr; ++row) run.lists[row].counted += counted[row];
}

const ScreenKernels screen = {
    .mr = kMr,
    .nr = kNr,
    .kr = kKr,
    .element_bytes = 2,
    .scale_bytes = 0,
    .exact = false,
    .pack_a = screen_pack<pack_a>,
    .pack_b = screen_pack<pack_panel_bf16<kNr, kKr>>,
    .tile = screen_tile,
    .run = screen_run,
    .begin_tiles = begin_tiles,
    .end_tiles = end_tiles,
};

}  // namespace
}  // namespace refine_fast
