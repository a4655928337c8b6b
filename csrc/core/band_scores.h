// What the two files of BandSearch share.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/band_topk.h"

namespace refine_fast {

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// the largest float <= x, and the smallest >= x
inline float down(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f;
}
// a float just below x, faster
inline float below(double x) { return static_cast<float>(x - std::abs(x) * 0x1p-23 - 0x1p-149); }
inline float up(double x) { return -down(-x); }

inline bool better(const Hit& a, const Hit& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

}  // namespace refine_fast
