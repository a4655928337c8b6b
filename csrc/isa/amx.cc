// AMX: 8 tiles of 16 rows x 64 bytes; TDPBF16PS does 16 x 16 x 32 in 16 cycles.
// Includes: intrinsics and POD headers only, everything static: a weak symbol compiled here could be merged into baseline code.
#include "core/kernels.h"

namespace refine_fast {

extern const Kernels amx_kernels = {
    .isa = Isa::amx,
    .matmul_f32 = nullptr,
    .matmul_bf16 = nullptr,
    .lerp = nullptr,
    .select = nullptr,
    .loss = nullptr,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
