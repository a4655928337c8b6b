// AVX-512 (F, BW, DQ, VL): 32 zmm registers, 2 FMA of 16 floats a cycle.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include "core/kernels.h"

namespace refine_fast {

extern const Kernels avx512_kernels = {
    .isa = Isa::avx512,
    .matmul_f32 = nullptr,
    .matmul_bf16 = nullptr,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
