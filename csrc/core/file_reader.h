// Reads files front to back in windows, the next window while the current one is used.
#pragma once
#include <cstdint>
#include <future>
#include <memory>
#include <vector>

#include "core/file.h"
#include "core/memory.h"

namespace refine_fast {

// One open file. On Linux its windows come from the page cache where they are in it, and past it otherwise; elsewhere
// they are plain reads.
class FileSource {
 public:
  virtual ~FileSource() = default;
  // Bytes begin .. end of the file to data, which has room for kWindow; begin is a multiple of kPage, end - begin <=
  // kWindow.
  virtual Status read(int64_t begin, int64_t end, char* data) const = 0;
};
std::unique_ptr<FileSource> open_source(const File& file);

class FileReader {
 public:
  // `policy` std::launch::async: the next window is read by a thread of its own.
  FileReader(const std::vector<File>& files, std::launch policy, const OnBlock& on_block)
      : files_(files), policy_(policy), on_block_(on_block) {}
  ~FileReader() { close(); }
  FileReader(const FileReader&) = delete;

  // *data, *bytes: what the window holds from `offset` on, at least `least` bytes
  Status at(int file, int64_t offset, int64_t least, const char** data, int64_t* bytes);

 private:
  struct Window {
    PageBuffer buffer{kWindow};  // the page in front takes what an element left in the window before
    int64_t begin = 0, end = 0;
    Status status;
    char* data() const { return buffer.data(); }
  };

  const File& current_file() const { return files_[static_cast<size_t>(file_)]; }
  void open(int file);
  void close();
  void load(Window* window, int64_t begin) const;
  Status fill(int file, int64_t offset, int64_t least);

  const std::vector<File>& files_;
  const std::launch policy_;
  const OnBlock& on_block_;
  int file_ = -1;
  std::unique_ptr<FileSource> source_;
  int64_t size_ = 0, begin_ = 0;  // begin_: where now_ begins, with what an element left in the window before it
  Window now_, next_;
  std::future<void> pending_;
};

}  // namespace refine_fast
