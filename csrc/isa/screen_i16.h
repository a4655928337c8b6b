// The screen of band_topk in 16-bit integers, written once over a level's vectors V (avx2.cc shows what is asked of it).
//
// The maths. A row x becomes the integers n = round(s x), and x' = n / s, with s = min(L / |x|, 32766 / max |x|) and L = 2^15.5 - sqrt(d)/2 - 1.
// No n leaves 16 bits; |n| <= s |x| + sqrt(d)/2 < 2^15.5, so by Cauchy-Schwarz neither n . m nor any partial sum leaves 32 bits: the sum is
// exact, and the score n . m / (s_x s_y) is off by the rounding of a conversion and two products. The rounding of a
// unit row is |x - x'| = sqrt(d / 12) / s = 1.2e-4 at d = 384, where bf16 loses 1.6e-3: an eighth of the margin, so an eighth of the doubt.
//
// The choice. A multiply-add takes two 16-bit products into each 32-bit lane: twice the products of a float32 FMA, as many as VDPBF16PS.
// MACs a cycle and core of Zen 5, 256 / 512 bits: FMA 16 / 32, VPMADDWD + VPADDD 29 / 54, VPDPWSSD 31 / 62, VDPBF16PS - / 58 (an Intel core adds
// on the ports that it multiplies on: there VPMADDWD + VPADDD equals FMA at 512 bits, and VPDPWSSD is twice that).
// 8-bit integers would double it again, but |x - x'| is 7e-3 there, and what the product gains the rescoring loses.
//
// A panel: for every 2W of d (W lanes a vector), W lines of one word a row; word j holds elements j (low half) and W + j (high half), since the
// order of the sum is free and these need no shuffle. After the lines, 1 / s of each row.
#pragma once
#include "core/screen_kernels.h"

namespace refine_fast {
namespace {

// s of one row; a row of denormals or of zeros keeps a finite one
template <class V>
float scale_i16(const float* x, int64_t d, double norm) {
  auto most = V::set(0.0f);
  for (int64_t p = 0; p < d; p += V::width) {
    const auto y = V::load(x + p, d - p);
    most = V::max(V::max(y, V::sub(V::set(0.0f), y)), most);
  }
  const double limit = 46339.9 - __builtin_sqrt(static_cast<double>(d)) / 2, largest = V::largest(most);
  double scale = 0x1p100;
  if (norm * scale > limit) scale = limit / norm;
  if (largest * scale > 32766) scale = 32766 / largest;
  return static_cast<float>(scale);
}

// n of W elements, and the squares of what the rounding left over
template <class V>
typename V::Word round_i16(const float* x, int64_t n, typename V::Float scale, typename V::Float& error) {
  const auto y = V::load(x, n);
  const auto integer = V::round_to_word(V::mul(y, scale));
  const auto left = V::fma(y, scale, V::sub(V::set(0.0f), V::to_float(integer)));
  error = V::fma(left, left, error);
  return integer;
}

template <class V, int kWidth>
void pack_i16(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel, double* residuals) {
  constexpr int W = V::width;
  const int64_t lines = (d + 2 * W - 1) / (2 * W) * W;
  int32_t* const words = static_cast<int32_t*>(panel);
  float* const inverse = reinterpret_cast<float*>(words + lines * kWidth);
  for (int64_t first = 0; first < kWidth; first += W) {
    const int64_t width = kWidth - first < W ? kWidth - first : W, left = count - first < W ? count - first : W;
    const float* const x = rows + first * stride;
    typename V::Float scale[W], error[W];
    for (int i = 0; i < W; ++i) {
      const float s = i < left ? scale_i16<V>(x + i * stride, d, norms[first + i]) : 0.0f;
      scale[i] = V::set(s), error[i] = V::set(0.0f);
      if (i < width) inverse[first + i] = i < left ? 1 / s : 0.0f;
    }
    for (int64_t line = 0, p = 0; line < lines; line += W, p += 2 * W) {
      typename V::Word block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        block[i] = V::zero();
        if (i >= left) continue;
        const float* const from = x + i * stride + p;
        const auto low = round_i16<V>(from, d - p, scale[i], error[i]);
        block[i] = V::pair(low, round_i16<V>(from + W, d - p - W, scale[i], error[i]));
      }
      V::transpose(block);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) V::store_words(words + (line + j) * kWidth + first, block[j], width);
    }
    for (int i = 0; i < left; ++i) {
      const double unit = inverse[first + i];
      residuals[first + i] = V::total(error[i]) * unit * unit;
    }
  }
}

template <class V, int kMr>
void tile_i16(const void* a, const void* b, int64_t d, float* scores, int64_t ld) {
  constexpr int W = V::width;
  const int64_t lines = (d + 2 * W - 1) / (2 * W) * W;
  const int32_t *pa = static_cast<const int32_t*>(a), *pb = static_cast<const int32_t*>(b);
  typename V::Sum sum[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = typename V::Sum{};
  for (int64_t line = 0; line < lines; ++line, pa += kMr, pb += 2 * W) {
    const auto y0 = V::load_words(pb), y1 = V::load_words(pb + W);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const auto x = V::broadcast(pa[i]);
      sum[i][0] = V::dot(sum[i][0], x, y0), sum[i][1] = V::dot(sum[i][1], x, y1);
    }
  }
  const float *inverse_a = reinterpret_cast<const float*>(pa), *inverse_b = reinterpret_cast<const float*>(pb);
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
constexpr ScreenKernels screen_i16 = {kMr,   2 * V::width, 2 * V::width, 2, 4, true, pack_i16<V, kMr>, pack_i16<V, 2 * V::width>,
                                      tile_i16<V, kMr>};

}  // namespace
}  // namespace refine_fast
