// Compares the NEON level with the scalar one, as a program for an Arm CPU or for qemu, which .ci/run cross-compiles
// and runs. Prints what differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/band_topk.h"
#include "core/best_of_groups.h"
#include "core/cpu.h"
#include "core/matmul.h"
#include "kernels/lerp_kernels.h"

using namespace refine_fast;

static int failures = 0;

static void expect(bool equal, const char* what, int64_t size) {
  if (!equal) std::printf("neon differs from scalar: %s, size %lld\n", what, static_cast<long long>(size)), ++failures;
}

static std::mt19937 generator(0);

static std::vector<float> normal(int64_t n, float scale = 1) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> x(n);
  for (float& value : x) value = distribution(generator);
  return x;
}

struct Found {
  std::vector<int64_t> ids, in_band;
  std::vector<float> scores;
};

// offsets: of documents that are groups of rows; empty if each is a row
static Found search(Isa isa, const std::vector<float>& queries, const std::vector<float>& docs, int64_t d, bool random,
                    const std::vector<int64_t>& offsets) {
  isa_force(isa);
  const bool grouped = !offsets.empty();
  const int64_t rows = static_cast<int64_t>(queries.size()) / d, k = 7,
                count = grouped ? static_cast<int64_t>(offsets.size()) - 1 : static_cast<int64_t>(docs.size()) / d;
  int64_t largest = 1;
  for (int64_t g = 0; g < count && grouped; ++g) largest = std::max(largest, offsets[g + 1] - offsets[g]);
  const BandSpec spec{d, k, 3, 0.1, random, 5, Order::skip_then_band, true, 3, largest};
  const std::vector<double> hi(rows, 0.6);
  BandSearch band(spec, 0, rows, hi.data(), {nullptr, nullptr});
  Found found{std::vector<int64_t>(rows * k), std::vector<int64_t>(rows), std::vector<float>(rows * k)};
  expect(bool(band.set_queries(queries.data(), Dtype::f32, d)) &&
             bool(band.push(docs.data(), Dtype::f32, d, count, 0, {}, grouped ? offsets.data() : nullptr)),
         "search", d);
  band.finish(found.ids.data(), found.scores.data(), found.in_band.data());
  return found;
}

// groups of these sizes in turn, until `rows` rows have one
static std::vector<int64_t> offsets_of(const std::vector<int64_t>& sizes, int64_t rows) {
  std::vector<int64_t> offsets{0};
  for (size_t i = 0; offsets.back() < rows; ++i)
    offsets.push_back(std::min(offsets.back() + sizes[i % sizes.size()], rows));
  return offsets;
}

static std::vector<float> best(Isa isa, const std::vector<float>& queries, const std::vector<float>& rows, int64_t d,
                               const std::vector<int64_t>& offsets) {
  isa_force(isa);
  const int64_t count = static_cast<int64_t>(queries.size()) / d, groups = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<float> found(count * groups);
  expect(
      bool(best_of_groups(
          {queries.data(), count, d, rows.data(), Dtype::f32, d, offsets.data(), groups, found.data(), groups, 3, {}})),
      "best_of_groups ends", d);
  return found;
}

template <class T>
static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

int main() {
  const Kernels& scalar = (isa_force(Isa::scalar), kernels());
  const Kernels& neon = (isa_force(Isa::neon), kernels());
  for (int64_t n : {1, 3, 16, 31, 32, 33, 100, 384, 1000}) {
    const std::vector<float> x = normal(n), y = normal(n);
    expect(neon.select->dot(x.data(), y.data(), n) == scalar.select->dot(x.data(), y.data(), n), "select dot", n);

    std::vector<float> base = x, tuned = y, a(n), b(n);
    base[0] = tuned[0] = -INFINITY, base[n / 2] = -0.0f, tuned[n / 2] = 0.0f;  // equal, so they must not change
    const std::vector<double> wide_base(base.begin(), base.end()), wide_tuned(tuned.begin(), tuned.end());
    std::vector<double> wide_a(n), wide_b(n);
    for (float weight : {0.35f, 0.65f}) {
      scalar.lerp->f32(base.data(), tuned.data(), n, weight, a.data()),
          neon.lerp->f32(base.data(), tuned.data(), n, weight, b.data());
      scalar.lerp->f64(wide_base.data(), wide_tuned.data(), n, weight, wide_a.data());
      neon.lerp->f64(wide_base.data(), wide_tuned.data(), n, weight, wide_b.data());
      expect(same_bits(a, b) && same_bits(wide_a, wide_b), "lerp", n);
    }
    Change exact, summed;  // the level sums in float32
    scalar.lerp->change(x.data(), y.data(), n, &exact), neon.lerp->change(x.data(), y.data(), n, &summed);
    expect(std::abs(summed.change_squared - exact.change_squared) <= 1e-4 * exact.change_squared &&
               std::abs(summed.base_squared - exact.base_squared) <= 1e-4 * exact.base_squared,
           "change", n);
    tuned[n - 1] = NAN;
    scalar.lerp->change(x.data(), tuned.data(), n, &exact), neon.lerp->change(x.data(), tuned.data(), n, &summed);
    expect(exact.not_finite == summed.not_finite && exact.not_finite == (n > 1 ? 2 : 1), "not finite", n);

    for (bool bf16 : {false, true}) {  // B is a column of ones, so the product is a sum
      const std::vector<float> ones(n, 1.0f);
      double exact = 0, size = 0;
      for (float value : x) {
        float rounded = value;
        if (bf16) {
          uint16_t half;
          scalar.from_f32(&value, Dtype::bf16, 1, &half), scalar.to_f32(&half, Dtype::bf16, 1, &rounded);
        }
        exact += rounded, size += std::abs(rounded);
      }
      const MatmulKernels& kernels = bf16 ? *neon.matmul_bf16 : *neon.matmul_f32;
      std::vector<char> panels(bytes_a(kernels, 1, n) + bytes_b(kernels, 1, n));
      float product = 0;
      pack_a(kernels, x.data(), n, 1, 1, n, panels.data()),
          pack_b(kernels, ones.data(), n, 1, 1, n, panels.data() + bytes_a(kernels, 1, n));
      matmul(kernels, panels.data(), panels.data() + bytes_a(kernels, 1, n), 1, 1, n, &product, 1, false);
      expect(std::abs(product - exact) <= static_cast<double>(n + 1) * 0x1p-24 * size, "matmul", n);
    }
  }
  for (int64_t d : {1, 8, 33}) {
    const std::vector<float> queries = normal(37 * d), docs = normal(1500 * d);
    // rows; groups of a few; groups larger than a strip before and after small ones
    const std::vector<int64_t> few = offsets_of({2, 9, 1, 4}, 1500), large = offsets_of({3, 1200, 2}, 1500);
    for (const std::vector<int64_t>& offsets : {std::vector<int64_t>{}, few, large})
      for (bool random : {false, true}) {
        const Found a = search(Isa::scalar, queries, docs, d, random, offsets),
                    b = search(Isa::neon, queries, docs, d, random, offsets);
        expect(a.ids == b.ids && a.in_band == b.in_band && same_bits(a.scores, b.scores), "band_topk", d);
      }
    // up to 4 queries take no tile
    for (int64_t count : {1, 4, 5, 37})
      for (const std::vector<int64_t>& offsets : {few, large}) {
        const std::vector<float> asked(queries.begin(), queries.begin() + count * d);
        const std::vector<float> a = best(Isa::scalar, asked, docs, d, offsets),
                                 b = best(Isa::neon, asked, docs, d, offsets);
        bool close = true;  // each is a sum of d products in float32 (Higham, section 3.1)
        for (size_t i = 0; i < a.size(); ++i)
          close &= std::abs(a[i] - b[i]) <= 2 * (static_cast<float>(d) + 1) * 0x1p-24f * 25 * static_cast<float>(d);
        expect(close, "best_of_groups", d);
      }
  }
  std::puts(failures == 0 ? "NEON agrees with scalar" : "failed");
  return failures != 0;
}
