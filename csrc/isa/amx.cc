// AMX: tiles multiply (isa/amx_tiles.h), AVX-512 does the rest.
// Includes only intrinsics and POD headers, and everything is static: a weak symbol compiled here could be merged into
// baseline code.
#include "isa/amx_f32.h"
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

const MatmulKernels matmul_finite_f32 = {
    .mr = kMr,
    .nr = kNr,
    .kr = kKr,
    .element_bytes = kPieces * 2,
    .pack_a = pack_a_f32,
    .pack_b = pack_b_f32,
    .tile = tile_f32,
    .begin_tiles = begin_tiles,
    .end_tiles = end_tiles,
    .rows_at_once = 2 * kMr,
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
    .matmul_finite_f32 = &matmul_finite_f32,
};

}  // namespace refine_fast
