// The streaming merge: outputs are written front to back, one piece (a tensor, or bytes to copy) after the other, while the inputs pass by in
// windows of 8 MiB. Nothing the size of a tensor is ever held: two windows an input, two buffers an output, and A of one LoRA update, packed.
//
// What goes past the page cache is measured, not guessed (a pair of 3.17 GB bf16 in 3 shards, cold; a pair of 0.44 GB float32, warm; ext4 on a
// virtual disk, 2 cores):
//   - cold inputs, direct reads: 3.1 GB/s into huge pages, in 0.02 CPU seconds a GB. Into small ones 1.0: a request to a disk lists the pieces
//     of memory that it fills, 254 of 4 KiB at most. A merge takes 3.2 s in place of 8.1, and the same reads and writes without the merge 2.9.
//     Nothing that was cached is evicted, since nothing enters the cache.
//   - through the cache: 2.9 GB/s where every window is dropped once it is read, in four to eight times the CPU seconds; 0.6 to 0.9 where none
//     is, since the host of a virtual machine takes free memory back, and gives each page of it anew.
//   - inputs that are cached already are read from there, window by window: 0.4 s for a pair of 0.54 GB, 1.35 past the cache (small pages).
//     mincore tells, to the owner; others try a read that does not wait (through the cache for want of an answer, their merge left all of both
//     inputs in it).
//   - outputs, direct writes: the warm merge takes 0.75 s, against 2.0 s through the cache with early write-back, the flush included (small
//     pages).
//   - the next window of each input is read, and the last buffer of each output written, by threads of their own: one thread keeps one request
//     in flight, and the device wants more. More than one writer a file gains nothing.
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

// `overlap`: reads and writes run beside the arithmetic, in threads of their own; else all happens in turn.
Status stream(const std::vector<File>& files, const std::vector<Piece>& pieces, const std::vector<LowRankFactors>& factors,
              std::vector<Output>& outputs, bool overlap, const OnBlock& on_block);

// Reserves `bytes` of disk for the file, its size unchanged; an error where they are not there. File systems without the call: no reservation.
Status preallocate(const File& file, int64_t bytes);

// Swaps two paths in one step (RENAME_EXCHANGE); false where the file system or the kernel cannot.
bool exchange_paths(const char* a, const char* b);

}  // namespace refine_fast
