// The screen of band_topk in 16- or 8-bit integers, written once for a level's vectors V (isa/avx2.cc shows what V must
// define).
//
// The maths. A row x becomes the integers n = round(s x), and x' = n / s, with s = min(M / max |x|, L / |x|). M is the
// largest integer, and L = 2^15.5 - sqrt(d)/2 - 1 makes |n| <= s |x| + sqrt(d)/2 < 2^15.5, so by Cauchy-Schwarz n . m
// fits 32 bits. The sum is exact (partial sums that wrap unwrap again), and the score n . m / (s_x s_y) errs only by
// the rounding of a conversion, of two products and of both 1 / s. Rounding moves a row by |x - x'| = sqrt(d / 12) / s.
// For a unit row at d = 384:
//     16 bits   8 bits    bf16, for comparison
//     1.2e-4    7e-3      1.6e-3
//
// The instructions. A multiply-add takes two 16-bit or four 8-bit products into each 32-bit lane. Measured
// multiply-adds a cycle on one core of Zen 5:
//     instruction          256 bits   512 bits
//     FMA                     16         32
//     VPMADDWD + VPADDD       29         54
//     VDPBF16PS                -         58
//     VPDPBUSD                 -        124
// An Intel core adds on the ports that it multiplies on: there VPMADDWD + VPADDD equals FMA at 512 bits. 8 bits leave
// three times as many documents in doubt as 16 (905 a query instead of 299 where 105 are kept; B = 4,096, N = 200,000,
// d = 384), and rescoring them takes back a fifth of what the product gains. Without VPDPBUSD 8 bits gain nothing:
// VPMADDUBSW saturates beyond 7 bits and needs a second multiply to reach 32-bit lanes.
//
// The rotation. 8 bits are too few for a row with one large element, as some encoders give every row: s shrinks with
// it. So bytes are taken from a rotated row, 64 elements at a time: signs from a fixed pattern (or equal elements would
// gather in one), then a Hadamard matrix / 8. It is orthogonal, so products stay the same, and one element of .5
// becomes 64 of .06.
//
// The accumulator: 32-bit integers, exact by the choice of s.
//
// The panel. For every W * E of d (W lanes of a vector, E integers of a word): W lines with one word of each row. Word
// j holds the elements j, W + j, ...: the order of the sum is free, and these need no shuffle. After the lines follow
// the start of each sum (bytes only) and 1 / s of each row. VPDPBUSD takes its first operand unsigned, so queries are
// stored as n + 128, and the sum of a document m starts at -128 sum(m).
#pragma once
#include "kernels/screen_kernels.h"

namespace refine_fast {
namespace {

template <class V>
constexpr bool kBytes = V::packed == 4;

template <class V>
constexpr int64_t lines_int(int64_t d) {
  return (d + V::width * V::packed - 1) / (V::width * V::packed) * V::width;
}

// W * E elements, rotated if they become bytes
template <class V>
void load_int(const float* x, int64_t n, typename V::Float y[V::packed]) {
  for (int e = 0; e < V::packed; ++e) y[e] = V::load(x + e * V::width, n - e * V::width);
  if constexpr (kBytes<V>) V::rotate(y);
}

// s of one row; finite also for a row of denormals or zeros
template <class V>
float scale_int(const float* x, int64_t d, double norm) {
  auto most = V::set(0.0f);
  for (int64_t p = 0; p < d; p += V::width * V::packed) {
    typename V::Float y[V::packed];
    load_int<V>(x + p, d - p, y);
    for (int e = 0; e < V::packed; ++e) most = V::max(V::max(y[e], V::sub(V::set(0.0f), y[e])), most);
  }
  const double limit = 46339.9 - __builtin_sqrt(static_cast<double>(d)) / 2, largest = V::largest(most);
  double scale = 0x1p100;
  if (norm * scale > limit) scale = limit / norm;
  if (largest * scale > V::largest_integer) scale = V::largest_integer / largest;
  return static_cast<float>(scale);
}

// n of W elements; adds the squares of the rounding errors to `error`
template <class V>
typename V::Word round_int(typename V::Float y, typename V::Float scale, typename V::Float& error) {
  const auto integer = V::round_to_word(V::mul(y, scale));
  const auto left = V::fma(y, scale, V::sub(V::set(0.0f), V::to_float(integer)));
  error = V::fma(left, left, error);
  return integer;
}

template <class V, int kWidth, bool kQueries>
void pack_int(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel,
              double* residuals) {
  constexpr int W = V::width, E = V::packed;
  const int64_t lines = lines_int<V>(d);
  int32_t *const words = static_cast<int32_t*>(panel), *const start = words + lines * kWidth;
  float* const inverse = reinterpret_cast<float*>(start + (kBytes<V> ? kWidth : 0));
  for (int64_t first = 0; first < kWidth; first += W) {
    const int64_t width = kWidth - first < W ? kWidth - first : W, left = count - first < W ? count - first : W;
    const float* const x = rows + first * stride;
    typename V::Float scale[W], error[W];
    typename V::Sum total = typename V::Sum{};
    for (int i = 0; i < W; ++i) {
      const float s = i < left ? scale_int<V>(x + i * stride, d, norms[first + i]) : 0.0f;
      scale[i] = V::set(s), error[i] = V::set(0.0f);
      if (i < width) inverse[first + i] = i < left ? 1 / s : 0.0f;
    }
    for (int64_t line = 0, p = 0; line < lines; line += W, p += W * E) {
      typename V::Word block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        block[i] = V::zero();
        if (i >= left) continue;
        typename V::Float y[E];
        typename V::Word n[E];
        load_int<V>(x + i * stride + p, d - p, y);
        for (int e = 0; e < E; ++e) n[e] = round_int<V>(y[e], scale[i], error[i]);
        block[i] = V::join(n);
      }
      V::transpose(block);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        if constexpr (kBytes<V> && kQueries) block[j] = V::add_128(block[j]);
        if constexpr (kBytes<V> && !kQueries) total = V::dot(total, V::add_128(V::zero()), block[j]);
        V::store_words(words + (line + j) * kWidth + first, block[j], width);
      }
    }
    if constexpr (kBytes<V> && !kQueries) V::store_words(start + first, (typename V::Word)(-total), width);
    for (int i = 0; i < left; ++i) {
      const double unit = inverse[first + i], rounded = __builtin_sqrt(static_cast<double>(V::total(error[i]))) * unit;
      const double rotated = kBytes<V> ? norms[first + i] * 0x1p-21 : 0.0;  // six additions of 2^-24 each
      residuals[first + i] = (rounded + rotated) * (rounded + rotated);
    }
  }
}

template <class V, int kMr>
void tile_int(const void* a, const void* b, int64_t d, float* scores, int64_t ld) {
  constexpr int W = V::width;
  const int64_t lines = lines_int<V>(d);
  const int32_t *pa = static_cast<const int32_t*>(a),
                *pb = static_cast<const int32_t*>(b), *const start = pb + lines * 2 * W;
  typename V::Sum sum[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    sum[i][0] = sum[i][1] = typename V::Sum{};
    if constexpr (kBytes<V>)
      sum[i][0] = (typename V::Sum)V::load_words(start), sum[i][1] = (typename V::Sum)V::load_words(start + W);
  }
  for (int64_t line = 0; line < lines; ++line, pa += kMr, pb += 2 * W) {
    const auto y0 = V::load_words(pb), y1 = V::load_words(pb + W);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const auto x = V::broadcast(pa[i]);
      sum[i][0] = V::dot(sum[i][0], x, y0), sum[i][1] = V::dot(sum[i][1], x, y1);
    }
  }
  const float* const inverse_a = reinterpret_cast<const float*>(pa + (kBytes<V> ? kMr : 0));
  const float* const inverse_b = reinterpret_cast<const float*>(pb + (kBytes<V> ? 2 * W : 0));
  const auto y0 = V::load(inverse_b), y1 = V::load(inverse_b + W);
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i, scores += ld) {
    const auto x = V::set(inverse_a[i]);
    V::store(scores, V::mul(V::mul(V::to_float(sum[i][0]), x), y0));
    V::store(scores + W, V::mul(V::mul(V::to_float(sum[i][1]), x), y1));
  }
}

// 12 (256 bits) or 24 (512 bits) accumulators of kMr rows x 2 vectors
template <class V, int kMr>
constexpr ScreenKernels screen_int = {
    .mr = kMr,
    .nr = 2 * V::width,
    .kr = V::width * V::packed,
    .element_bytes = 4 / V::packed,
    .scale_bytes = kBytes<V> ? 8 : 4,
    .exact = true,
    .pack_a = pack_int<V, kMr, true>,
    .pack_b = pack_int<V, 2 * V::width, false>,
    .tile = tile_int<V, kMr>,
};

}  // namespace
}  // namespace refine_fast
