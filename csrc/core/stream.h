// The streaming merge: outputs are written front to back, one piece (a tensor, or bytes to copy) after the other, while the inputs pass by in
// windows of 8 MiB. Nothing the size of a tensor is ever held: two input windows and one output buffer per output, 64-byte rows of LoRA factors aside.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/lerp.h"
#include "core/types.h"

namespace refine_fast {

struct File {
  int fd;
  std::string name;  // for messages
};

// tuned = base + B A, B (rows, rank), A (rank, cols), float32: an adapter's update, its scale already in B
struct LowRankFactors {
  const float* a;
  const float* b;
  int64_t rank, rows, cols;
};

struct Piece {
  int64_t count;             // elements; bytes where base_type is raw
  Storage base_type, tuned_type, out_type;
  int32_t base_file, tuned_file;      // into files; tuned_file -1: none (copied, or low_rank)
  int64_t base_offset, tuned_offset;  // of the first byte in its file
  int32_t low_rank;                   // into factors; -1: none
};

struct Output {
  File file;
  int64_t offset;               // where the first piece goes
  std::vector<double> weights;  // one per piece
  std::vector<Change> changes;  // filled in, one per piece
};

// Called after each window is read (file as in files) or written (file = -1 - output). False stops the work with Code::interrupted.
using OnBlock = std::function<bool(int file, int64_t offset, const void* data, int64_t bytes)>;

// `ahead`: each input's next window is read by a thread of its own meanwhile.
Status stream(const std::vector<File>& files, const std::vector<Piece>& pieces, const std::vector<LowRankFactors>& factors,
              std::vector<Output>& outputs, bool ahead, const OnBlock& on_block);

// Reserves `bytes` of disk for the file, its size unchanged; an error where they are not there. File systems without the call: no reservation.
Status preallocate(const File& file, int64_t bytes);

// Swaps two paths in one step (RENAME_EXCHANGE); false where the file system or the kernel cannot.
bool exchange_paths(const char* a, const char* b);

}  // namespace refine_fast
