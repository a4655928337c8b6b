// The streaming merge behind fuse: out = base + weight * (tuned - base), tensor by tensor. Outputs are written front to
// back, one piece (a tensor, or bytes to copy) after the other, while the inputs pass in windows of 8 MiB. Nothing the
// size of a tensor is ever held: only two windows for each input (core/file_reader.h), two buffers for each output
// (core/file_writer.h), and A of one LoRA update, packed (core/low_rank.h).
//
// Roofline: the disk. One thread keeps one request in flight, and the device wants more, so the next window of each
// input is read, and the last buffer of each output written, by threads of their own. More than one writer for a file
// gains nothing.
#pragma once
#include <cstdint>
#include <vector>

#include "core/file.h"
#include "core/lerp.h"
#include "core/low_rank.h"
#include "kernels/types.h"

namespace refine_fast {

struct Piece {
  int64_t count;  // elements; bytes where base_type is raw
  Storage base_type, tuned_type, out_type;
  int32_t base_file, tuned_file;      // into files; tuned_file -1: none (copied, or low_rank)
  int64_t base_offset, tuned_offset;  // of the first byte in its file
  int32_t low_rank;                   // into factors; -1: none
};

struct Output {
  File file;
  int64_t offset;               // where the first piece goes
  std::vector<double> weights;  // one for each piece
  std::vector<Change> changes;  // filled in, one for each piece
};

// `overlap`: reads and writes run beside the arithmetic, in threads of their own; else one after the other.
Status merge(const std::vector<File>& files, const std::vector<Piece>& pieces,
             const std::vector<LowRankFactors>& factors, std::vector<Output>& outputs, bool overlap,
             const OnBlock& on_block);

}  // namespace refine_fast
