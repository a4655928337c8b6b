// out = base + weight * (tuned - base) over memory of any float type that a checkpoint may hold.
#pragma once
#include <cstdint>

#include "kernels/lerp_kernels.h"
#include "kernels/types.h"

namespace refine_fast {

// How an element is stored. The first four are those of Dtype; `raw` is a byte that is only copied.
enum class Storage : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, f8_e4m3 = 4, f8_e5m2 = 5, raw = 6 };

constexpr int64_t storage_bytes(Storage s) {
  constexpr int64_t kBytes[] = {4, 2, 2, 8, 1, 1, 1};
  return kBytes[static_cast<int>(s)];
}

// Pointers need no alignment. `change` may be null, and out may be base then. Arithmetic is in float64 if base is f64,
// else in float32, with one rounding to nearest even into out's type.
void lerp(Storage base_type, const void* base, Storage tuned_type, const void* tuned, Storage out_type, void* out,
          int64_t n, double weight, Change* change);

// Converts n elements of src to float32 in dst, which is aligned.
void storage_to_f32(Storage type, const void* src, int64_t n, float* dst);

}  // namespace refine_fast
