#include "core/memory.h"

#include <sys/mman.h>

#include "core/numeric.h"

namespace refine_fast {

void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const int64_t skipped = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(begin) & (kHugePage - 1));
  if (bytes - skipped >= kHugePage)
    madvise(static_cast<char*>(begin) + skipped, static_cast<size_t>(round_down(bytes - skipped, kHugePage)),
            MADV_HUGEPAGE);
#else
  static_cast<void>(begin), static_cast<void>(bytes);
#endif
}

PageBuffer::PageBuffer(int64_t bytes)
    : map_bytes_(static_cast<size_t>(round_up(std::max(bytes, kPage), kPage) + kPage + kHugePage)) {
  map_ = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(map_) + kPage;
  data_ = static_cast<char*>(map_) + kPage + (-begin & (kHugePage - 1));
  prefer_huge_pages(data_, bytes);
}

PageBuffer::~PageBuffer() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

}  // namespace refine_fast
