// NEON (Armv8-A): 32 registers of 4 floats.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include "core/kernels.h"

namespace refine_fast {

extern const Kernels neon_kernels = {
    .isa = Isa::neon,
    .matmul_f32 = nullptr,
    .matmul_bf16 = nullptr,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
