// Writes a file front to back through two buffers: one is filled while the other is written.
#pragma once
#include <cstdint>
#include <future>
#include <memory>

#include "core/file.h"
#include "core/memory.h"

namespace refine_fast {

// One open file. On Linux whole pages are written past the page cache: a merge of cached inputs takes 0.75 s, against
// 2.0 s through the cache with early write-back, the flush included (a pair of 0.44 GB float32, ext4 on a virtual disk,
// small pages).
class FileSink {
 public:
  virtual ~FileSink() = default;
  // `bytes` of data to the file at `begin`; begin is a multiple of kPage, data is page-aligned.
  virtual Status write(int64_t begin, int64_t bytes, const char* data) = 0;
};
std::unique_ptr<FileSink> open_sink(const File& file);

class FileWriter {
 public:
  // Writes from `offset` on. `index` is the output's number for on_block; `policy` std::launch::async: a thread of its
  // own writes.
  FileWriter(const File& file, int64_t offset, int index, std::launch policy, const OnBlock& on_block);
  ~FileWriter() { pending_ = {}; }  // waits for the thread
  FileWriter(const FileWriter&) = delete;

  // Reads back what the first page holds already, which is written again with it.
  Status open();
  char* tail() { return filled_.data() + used_; }
  int64_t space() const { return kWindow - used_; }
  void advance(int64_t bytes) { used_ += bytes; }

  // Sends whole pages to the file; with `last` the rest too, and waits.
  Status flush(bool last);

 private:
  Status wait();  // for the thread that writes

  const File& file_;
  const int64_t offset_;
  const int index_;
  const std::launch policy_;
  const OnBlock& on_block_;
  const std::unique_ptr<FileSink> sink_;
  PageBuffer filled_{kWindow}, written_{kWindow};
  int64_t begin_, used_;  // of filled_: its place in the file, its bytes
  std::future<Status> pending_;
};

}  // namespace refine_fast
