#include "core/lerp.h"

#include <array>
#include <cmath>
#include <cstring>

#include "core/cpu.h"

namespace refine_fast {
namespace {

// Elements of a block: three float64 arrays of that size fill half of an L1 cache.
constexpr int64_t kBlock = 1024;

// --- fp8 ----------------------------------------------------------------------------------------
// A table of 256 values to read, torch's rounding to write (2.13: e4m3 saturates at 448, e5m2 overflows to infinity).

template <int kExponentBits>
struct Fp8 {
  static constexpr int kMantissaBits = 7 - kExponentBits, kBias = (1 << (kExponentBits - 1)) - 1,
                       kShift = 23 - kMantissaBits;
  static constexpr bool kHasInfinity = kExponentBits == 5;  // e4m3 ("fn") ends at 448 and has NaN only

  static std::array<float, 256> decode_table() {
    std::array<float, 256> table;
    for (int i = 0; i < 256; ++i) {
      const int exponent = (i & 0x7f) >> kMantissaBits, mantissa = i & ((1 << kMantissaBits) - 1);
      float f = exponent == 0
                    ? std::ldexp(static_cast<float>(mantissa), 1 - kBias - kMantissaBits)
                    : std::ldexp(static_cast<float>((1 << kMantissaBits) + mantissa), exponent - kBias - kMantissaBits);
      if (kHasInfinity && exponent == 31) f = mantissa ? NAN : INFINITY;
      if (!kHasInfinity && (i & 0x7f) == 0x7f) f = NAN;
      table[static_cast<size_t>(i)] = (i & 0x80) ? -f : f;
    }
    return table;
  }

  static uint8_t encode(float f) {
    // 65536 (values that round up to it become infinity through the carry) or 448
    constexpr uint32_t kOverflow = kHasInfinity ? 143u << 23 : 1086u << 20;
    constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
    // adding it rounds to a multiple of the smallest denormal
    constexpr uint32_t kDenormal = static_cast<uint32_t>(128 - kBias + kShift) << 23;
    uint32_t b;
    std::memcpy(&b, &f, 4);
    const uint32_t sign = (b >> 24) & 0x80u;
    b &= 0x7fffffffu;
    if (b > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
    if (b >= kOverflow) return static_cast<uint8_t>(sign | (kHasInfinity ? 0x7cu : 0x7eu));
    if (b < kSmallestNormal) {
      float magnitude, unit;
      std::memcpy(&magnitude, &b, 4), std::memcpy(&unit, &kDenormal, 4);
      magnitude += unit;
      std::memcpy(&b, &magnitude, 4);
      return static_cast<uint8_t>(sign | (b - kDenormal));
    }
    b += (static_cast<uint32_t>(kBias - 127) << 23) + ((1u << (kShift - 1)) - 1) + ((b >> kShift) & 1u);
    return static_cast<uint8_t>(sign | (b >> kShift));
  }

  static void to_f32(const uint8_t* src, int64_t n, float* dst) {
    static const std::array<float, 256> table = decode_table();
    for (int64_t i = 0; i < n; ++i) dst[i] = table[src[i]];
  }

  static void from_f32(const float* src, int64_t n, uint8_t* dst) {
    for (int64_t i = 0; i < n; ++i) dst[i] = encode(src[i]);
  }
};

// --- any storage type <-> a block of float32 or float64 -----------------------------------------
// A header of odd length misaligns the data after it: such a block is copied first.

bool aligned(Storage type, const void* data) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(storage_bytes(type)) == 0;
}

void to_f32(Storage type, const void* src, int64_t n, float* dst) {
  if (type == Storage::f8_e4m3) return Fp8<4>::to_f32(static_cast<const uint8_t*>(src), n, dst);
  if (type == Storage::f8_e5m2) return Fp8<5>::to_f32(static_cast<const uint8_t*>(src), n, dst);
  alignas(64) char copy[kBlock * 8];
  if (!aligned(type, src)) src = std::memcpy(copy, src, static_cast<size_t>(n * storage_bytes(type)));
  kernels().to_f32(src, static_cast<Dtype>(type), n, dst);
}

void from_f32(const float* src, Storage type, int64_t n, void* dst) {
  if (type == Storage::f8_e4m3) return Fp8<4>::from_f32(src, n, static_cast<uint8_t*>(dst));
  if (type == Storage::f8_e5m2) return Fp8<5>::from_f32(src, n, static_cast<uint8_t*>(dst));
  if (aligned(type, dst)) return kernels().from_f32(src, static_cast<Dtype>(type), n, dst);
  alignas(64) char copy[kBlock * 8];
  kernels().from_f32(src, static_cast<Dtype>(type), n, copy);
  std::memcpy(dst, copy, static_cast<size_t>(n * storage_bytes(type)));
}

// The block as float32: where it lies if it can be used there, else in `buffer`.
const float* as_f32(Storage type, const void* src, int64_t n, float* buffer) {
  if (type == Storage::f32 && aligned(type, src)) return static_cast<const float*>(src);
  to_f32(type, src, n, buffer);
  return buffer;
}

void to_f64(Storage type, const void* src, int64_t n, double* dst) {
  if (type == Storage::f64) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 8);
    return;
  }
  float block[kBlock];
  to_f32(type, src, n, block);
  for (int64_t i = 0; i < n; ++i) dst[i] = block[i];
}

// Whether all three are of one 16-bit type for which the level has a kernel.
bool in_registers(Storage base_type, const void* base, Storage tuned_type, const void* tuned, Storage out_type,
                  const void* out) {
  return kernels().lerp->half != nullptr && (base_type == Storage::bf16 || base_type == Storage::f16) &&
         tuned_type == base_type && out_type == base_type && aligned(base_type, base) && aligned(base_type, tuned) &&
         aligned(base_type, out);
}

void block_in_f32(Storage base_type, const void* base, Storage tuned_type, const void* tuned, Storage out_type,
                  void* out, int64_t n, double weight, Change* change) {
  alignas(64) float base_buffer[kBlock], tuned_buffer[kBlock], out_buffer[kBlock];
  const float w = static_cast<float>(weight);
  const bool whole = w == 1.0f;
  if (in_registers(base_type, base, tuned_type, tuned, out_type, out)) {
    kernels().lerp->half(static_cast<const uint16_t*>(whole ? tuned : base), static_cast<const uint16_t*>(tuned),
                         static_cast<Dtype>(base_type), n, w, static_cast<uint16_t*>(out));
  } else {
    const float *a = as_f32(base_type, base, n, base_buffer), *b = as_f32(tuned_type, tuned, n, tuned_buffer);
    const bool there = out_type == Storage::f32 && aligned(out_type, out);
    float* o = there ? static_cast<float*>(out) : out_buffer;
    kernels().lerp->f32(whole ? b : a, b, n, w, o);
    if (!there) from_f32(o, out_type, n, out);
  }
  if (change == nullptr) return;
  kernels().lerp->change(as_f32(base_type, base, n, base_buffer), as_f32(out_type, out, n, out_buffer), n, change);
}

void block_in_f64(const void* base, Storage tuned_type, const void* tuned, Storage out_type, void* out, int64_t n,
                  double weight, Change* change) {
  alignas(64) double a[kBlock], b[kBlock], o[kBlock];
  to_f64(Storage::f64, base, n, a);
  to_f64(tuned_type, tuned, n, b);
  kernels().lerp->f64(weight == 1.0 ? b : a, b, n, weight, o);
  if (out_type == Storage::f64) {
    std::memcpy(out, o, static_cast<size_t>(n) * 8);
  } else {
    float narrow[kBlock];
    for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<float>(o[i]);
    from_f32(narrow, out_type, n, out);
    to_f64(out_type, out, n, o);
  }
  if (change == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    const double d = o[i] - a[i];
    change->change_squared += d * d;
    change->base_squared += a[i] * a[i];
    change->not_finite += !std::isfinite(o[i]);
  }
}

}  // namespace

void storage_to_f32(Storage type, const void* src, int64_t n, float* dst) {
  const char* s = static_cast<const char*>(src);
  for (int64_t i = 0; i < n; i += kBlock)
    to_f32(type, s + i * storage_bytes(type), n - i < kBlock ? n - i : kBlock, dst + i);
}

void lerp(Storage base_type, const void* base, Storage tuned_type, const void* tuned, Storage out_type, void* out,
          int64_t n, double weight, Change* change) {
  const char *a = static_cast<const char*>(base), *b = static_cast<const char*>(tuned);
  char* o = static_cast<char*>(out);
  // Equal elements are copied, so a weight of 0 or 1 interpolates one input with itself: the other may not be finite.
  if (base_type == Storage::f64 ? weight == 0.0 : static_cast<float>(weight) == 0.0f) b = a, tuned_type = base_type;
  for (int64_t left = n; left > 0;) {
    const int64_t m = left < kBlock ? left : kBlock;
    if (base_type == Storage::f64)
      block_in_f64(a, tuned_type, b, out_type, o, m, weight, change);
    else
      block_in_f32(base_type, a, tuned_type, b, out_type, o, m, weight, change);
    a += m * storage_bytes(base_type), b += m * storage_bytes(tuned_type), o += m * storage_bytes(out_type), left -= m;
  }
}

}  // namespace refine_fast
