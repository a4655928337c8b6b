// The loss kernels, written once for a vector V of floats that each level defines (Floats in isa/scalar.cc is the
// simplest). Everything is in an anonymous namespace, so each ISA file compiles its own copy with its own flags.
#pragma once
#include <cstddef>

#include "kernels/loss_kernels.h"

namespace refine_fast {
namespace {

constexpr float kInfinity = __builtin_inff();

// Cody-Waite reduction and Cephes' polynomial: relative error 1 ulp on [-87, 1], and 0 below (e^-87 = 1.6e-38, against
// a sum of at least 1). NaN stays NaN.
template <class V>
inline typename V::Float exponential(typename V::Float x) {
  const auto floor = V::set(-87.0f), clamped = V::max(floor, x);
  const auto n = V::round(V::mul(clamped, V::set(1.44269504f)));
  const auto r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), clamped));
  auto p = V::fma(V::set(1.9875691500e-4f), r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(V::mul(r, r), p, V::add(r, V::set(1.0f)));
  return V::where(V::below(x, floor), V::set(0.0f), V::mul(p, V::exp2_integer(n)));
}

// s of column j, -inf if it is not a negative
template <class V>
inline typename V::Float negative(const ScoreRow& row, int64_t j) {
  auto x = V::load(row.s + j);
  x = V::where(V::below(V::set(row.ceiling), x), V::set(-kInfinity), x);
  return row.ids == nullptr ? x : V::where(V::equal(row.ids + j, row.id), V::set(-kInfinity), x);
}

template <class V>
float top(ScoreRow row) {
  auto most = V::set(-kInfinity);
  for (int64_t j = 0; j < row.n; j += V::width) most = V::max(most, negative<V>(row, j));
  return V::largest(most);
}

// The accumulator: float lanes are emptied into doubles every 64 steps, so the sum over a million columns keeps its
// digits, with one lane or 16.
template <class V>
void sums(ScoreRow row, float scale, float top, double* sums) {
  const auto rate = V::set(scale), shift = V::set(top), floor = V::set(-87.0f);
  for (int64_t begin = 0; begin < row.n; begin += 64 * V::width) {
    const int64_t end = begin + 64 * V::width < row.n ? begin + 64 * V::width : row.n;
    auto sum = V::set(0.0f), moment = V::set(0.0f);
    for (int64_t j = begin; j < end; j += V::width) {
      const auto z = V::mul(V::sub(negative<V>(row, j), shift), rate), e = exponential<V>(z);
      sum = V::add(sum, e);
      moment = V::fma(e, V::max(floor, z), moment);
    }
    sums[0] += V::total(sum);
    sums[1] += V::total(moment);
  }
}

template <class V>
void weights(ScoreRow row, float scale, float top, float factor, float* out) {
  const auto rate = V::set(scale), shift = V::set(top), size = V::set(factor);
  for (int64_t j = 0; j < row.n; j += V::width)
    V::store(out + j, V::mul(size, exponential<V>(V::mul(V::sub(negative<V>(row, j), shift), rate))));
}

// s of column j for query `id`, -inf if that query is not a negative of the column
template <class V>
inline typename V::Float negative(const float* s, int64_t j, const int32_t* ids, int32_t id, const float* ceilings) {
  auto x = V::load(s + j);
  if (ceilings != nullptr) x = V::where(V::below(V::load(ceilings + j), x), V::set(-kInfinity), x);
  return V::where(V::equal(ids + j, id), V::set(-kInfinity), x);
}

// The accumulator: a column's sum grows by one query at a time, a chain as long as the batch. Kahan's summation keeps
// its digits.
template <class V>
void column_sums(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id, const float* ceilings,
                 float* top, float* sum, float* excess) {
  const auto rate = V::set(scale), zero = V::set(0.0f), one = V::set(1.0f);
  for (int64_t j = 0; j < n; j += V::width) {
    const auto old = V::load(top + j), total = V::load(sum + j), over = V::load(excess + j);
    const auto delta = V::mul(V::sub(negative<V>(s, j, ids, id, ceilings), old), rate);
    const auto rises = V::below(zero, delta);
    const auto e = exponential<V>(V::where(rises, V::sub(zero, delta), delta));  // of the smaller against the larger
    const auto term = V::sub(e, over), more = V::add(total, term);
    V::store(sum + j, V::where(rises, V::fma(total, e, one), more));
    V::store(excess + j, V::where(rises, V::mul(over, e), V::sub(V::sub(more, total), term)));
    V::store(top + j, V::where(rises, V::load(s + j), old));
  }
}

template <class V>
double column_weights(const float* s, int64_t n, float scale, const int32_t* ids, int32_t id, const float* ceilings,
                      const float* top, const float* weight, const float* positive, float* out) {
  const auto rate = V::set(scale);
  double moment = 0;
  for (int64_t begin = 0; begin < n; begin += 64 * V::width) {
    const int64_t end = begin + 64 * V::width < n ? begin + 64 * V::width : n;
    auto partial = V::set(0.0f);
    for (int64_t j = begin; j < end; j += V::width) {
      const auto z = V::mul(V::sub(negative<V>(s, j, ids, id, ceilings), V::load(top + j)), rate);
      const auto w = V::mul(V::load(weight + j), exponential<V>(z));
      V::store(out + j, w);
      partial = V::fma(w, V::mul(V::sub(V::load(s + j), V::load(positive + j)), rate), partial);
    }
    moment += V::total(partial);
  }
  return moment;
}

// Sums in runs of 64 steps, like core/matmul.cc.
template <class V>
float dot(const float* x, const float* y, int64_t n) {
  float total = 0;
  for (int64_t begin = 0; begin < n; begin += 64 * V::width) {
    const int64_t end = begin + 64 * V::width < n ? begin + 64 * V::width : n;
    auto sum = V::set(0.0f);
    int64_t j = begin;
    for (; j + V::width <= end; j += V::width) sum = V::fma(V::load(x + j), V::load(y + j), sum);
    float run = V::total(sum);
    for (; j < end; ++j) run += x[j] * y[j];
    total += run;
  }
  return total;
}

template <class V>
void axpy(float a, const float* x, float* y, int64_t n) {
  const auto factor = V::set(a);
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) V::store(y + j, V::fma(factor, V::load(x + j), V::load(y + j)));
  for (; j < n; ++j) y[j] += a * x[j];
}

template <class V>
constexpr LossKernels loss_kernels = {top<V>, sums<V>, weights<V>, column_sums<V>, column_weights<V>, dot<V>, axpy<V>};

}  // namespace
}  // namespace refine_fast
