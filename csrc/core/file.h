// Files by descriptor, as the bindings hand them over: what the reader and the writer of a merge share.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "core/memory.h"
#include "kernels/types.h"

namespace refine_fast {

constexpr int64_t kWindow = 4 * kHugePage;  // bytes of a request to a file

struct File {
  int fd;
  std::string name;  // for messages
};

// Called after each window is read (file as in the caller's list) or written (file = -1 - output). False stops the work
// with Code::interrupted.
using OnBlock = std::function<bool(int file, int64_t offset, const void* data, int64_t bytes)>;

// "<doing> <file> failed: <why>"
Status io_failure(const char* doing, const File& file, const char* why);

// Whether reads and writes take the portable path (pread and pwrite through the page cache): on every system but Linux,
// and where the environment variable REFINE_FAST_PORTABLE_IO is set, which lets the tests run it on Linux.
bool portable_io();

// The file behind a descriptor opened once more for direct I/O, past the page cache; -1 where the file system cannot
// (tmpfs, no /proc).
int reopen_direct(int fd, int mode);

// Reserves `bytes` of disk for the file without changing its size; an error if the disk has no room. File systems
// without the call: no reservation.
Status preallocate(const File& file, int64_t bytes);

// Swaps two paths in one step (RENAME_EXCHANGE); false where the file system or the system cannot.
bool exchange_paths(const char* a, const char* b);

}  // namespace refine_fast
