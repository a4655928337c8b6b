// AMX: tiles multiply (isa/amx_tiles.h), AVX-512 does the rest.
// Includes only intrinsics and POD headers, and everything is static: a weak symbol compiled here could be merged into
// baseline code.
#include "isa/amx_loss.h"
#include "isa/amx_screen.h"
#include "isa/amx_tiles.h"
#include "kernels/kernels.h"

namespace refine_fast {
namespace {

const MatmulKernels matmul_bf16 = {
    .mr = kMr,
    .nr = kNr,
    .kr = kKr,
    .element_bytes = 2,
    .pack_a = pack_a,
    .pack_b = pack_panel_bf16<kNr, kKr>,
    .tile = tile,
    .pack_b_bf16 = pack_panel_words<kNr, kKr>,
    .begin_tiles = begin_tiles,
    .end_tiles = end_tiles,
};

}  // namespace

extern const Kernels amx_kernels = {
    .isa = Isa::amx,
    .matmul_f32 = nullptr,
    .matmul_bf16 = &matmul_bf16,
    .lerp = nullptr,
    .screen = &screen,
    .select = nullptr,
    .loss = nullptr,
    .fused_loss = &fused_loss,
    .to_f32 = nullptr,
    .from_f32 = nullptr,
};

}  // namespace refine_fast
