// The screen of band_topk: a fast product of rounded rows whose error is known for each row (core/band_topk.h bounds
// it).
#pragma once
#include <cstdint>

namespace refine_fast {

// Operands have the format of the level's fastest multiplier that is accurate enough: 8- or 16-bit integers
// (isa/screen_int.h), bf16 (isa/amx.cc) or float32 (isa/screen_f32.h). A panel of `width` rows takes round_up(d, kr) *
// width * element_bytes + width * scale_bytes bytes, 64-byte aligned.
struct ScreenKernels {
  int32_t mr, nr, kr;     // rows (queries) and columns (documents) of a tile, granularity of d
  int32_t element_bytes;  // of an operand
  int32_t scale_bytes;    // of a row's scale; 0 if the operands are the values themselves
  bool exact;             // the sums are integers: only their conversion rounds
  // Rounds `count` <= mr (nr) rows x of d floats to operands x', zero beyond count and d. norms[r] >= |x|; residuals[r]
  // = |x - x'|^2, up to the rounding of a float32 sum of d terms.
  void (*pack_a)(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel,
                 double* residuals);
  void (*pack_b)(const float* rows, int64_t stride, int64_t count, int64_t d, const double* norms, void* panel,
                 double* residuals);
  // Writes the whole mr x nr tile of scores x' . y', row stride ld.
  void (*tile)(const void* a, const void* b, int64_t d, float* scores, int64_t ld);
  // as in MatmulKernels
  void (*begin_tiles)() = nullptr;
  void (*end_tiles)() = nullptr;
};

}  // namespace refine_fast
