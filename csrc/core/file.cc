#include "core/file.h"

#include <errno.h>
#include <fcntl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace refine_fast {

Status io_failure(const char* doing, const File& file, const char* why) {
  Status status{Code::io, {}};
  std::snprintf(status.message, sizeof status.message, "%s %s failed: %s", doing, file.name.c_str(), why);
  return status;
}

#if defined(__linux__)

bool portable_io() {
  const char* const set = std::getenv("REFINE_FAST_PORTABLE_IO");
  return set != nullptr && *set != '\0';
}

int reopen_direct(int fd, int mode) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  return open(path, mode | O_DIRECT | O_CLOEXEC);
}

Status preallocate(const File& file, int64_t bytes) {
  while (bytes != 0 && fallocate(file.fd, FALLOC_FL_KEEP_SIZE, 0, bytes) != 0) {
    if (errno == EOPNOTSUPP || errno == ENOSYS) break;
    if (errno != EINTR) return io_failure("reserving disk space for", file, std::strerror(errno));
  }
  return {};
}

bool exchange_paths(const char* a, const char* b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0; }

#else

bool portable_io() { return true; }
int reopen_direct(int, int) { return -1; }
Status preallocate(const File&, int64_t) { return {}; }
bool exchange_paths(const char*, const char*) { return false; }

#endif

}  // namespace refine_fast
