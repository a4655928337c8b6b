// IEEE half precision by its bits.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float size = exponent == 31  ? (fraction == 0 ? HUGE_VALF : __int_as_float(0x7fc00000))
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : __int_as_float((exponent + 112) << 23 | fraction << 13);
  return h.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  const int ulp = size < 0x1p-14f ? -24 : exponent - 11;
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, -ulp)));  // to nearest even; 0 .. 2048
  // 11 bits in units of 2^ulp: above the denormals the leading bit adds 1 to the exponent field
  return {static_cast<uint16_t>(sign | (((ulp + 24) << 10) + steps))};
}
