// Buffers of the core: aligned for the kernels, uninitialized, released with their owner. Both throw std::bad_alloc.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace refine_fast {

// n elements on the heap, aligned to 64 bytes (a cache line, and the widest vector).
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T), kAlignment))) {}
  Buffer(int64_t n, T value) : Buffer(n) { std::fill_n(data_, n, value); }
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T* operator+(int64_t i) const { return data_ + i; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;

// Asks the system for huge pages in memory that is about to be written for the first time: a page fault for each 4 KB
// would take longer than the writing.
void prefer_huge_pages(void* begin, int64_t bytes);

// Bytes in a mapping of their own, which the system takes back on release: malloc would keep freed pages, and a merge
// of ten parts would grow by a part's buffers. The first byte lies on a huge page where the system grants them: direct
// I/O into small pages runs at a third of the rate (core/file_reader.h). One more page lies in front of the first byte
// and may be written.
class PageBuffer {
 public:
  PageBuffer() = default;
  explicit PageBuffer(int64_t bytes);
  ~PageBuffer();
  PageBuffer(PageBuffer&& other) noexcept { *this = std::move(other); }
  PageBuffer& operator=(PageBuffer&& other) noexcept {
    std::swap(map_, other.map_), std::swap(map_bytes_, other.map_bytes_), std::swap(data_, other.data_);
    return *this;
  }

  char* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
  char* data_ = nullptr;
};

// Bytes in huge pages of their own, or on the heap if they do not fill one: a mapping would cost a small task more than
// its work.
class WorkBuffer {
 public:
  WorkBuffer() = default;
  explicit WorkBuffer(int64_t bytes) {
    if (bytes < kHugePage)
      heap_ = std::make_unique<Buffer<char>>(bytes);
    else
      pages_ = PageBuffer(bytes);
  }

  char* data() const { return heap_ ? heap_->data() : pages_.data(); }
  float* floats() const { return reinterpret_cast<float*>(data()); }

 private:
  std::unique_ptr<Buffer<char>> heap_;
  PageBuffer pages_;
};

// n elements in a WorkBuffer, uninitialized.
template <class T>
class WorkArray {
 public:
  explicit WorkArray(int64_t n) : bytes_(n * static_cast<int64_t>(sizeof(T))) {}

  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  T* operator+(int64_t i) const { return data() + i; }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  WorkBuffer bytes_;
};

}  // namespace refine_fast
