// AVX-512 with VDPBF16PS: two bf16 products into each of 16 floats.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include "core/kernels.h"

namespace refine_fast {

extern const Kernels avx512_bf16_kernels = {
    .isa = Isa::avx512_bf16,
    .matmul_f32 = nullptr,
    .matmul_bf16 = nullptr,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
