#include "core/file_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "core/numeric.h"
#include "core/stages.h"

namespace refine_fast {
namespace {

class PlainSink : public FileSink {
 public:
  explicit PlainSink(const File& file) : file_(file) {}

  Status write(int64_t begin, int64_t bytes, const char* data) override {
    for (int64_t done = 0; done < bytes;) {
      const ssize_t put = pwrite(file_.fd, data + done, static_cast<size_t>(bytes - done), begin + done);
      if (put >= 0) {
        done += put;
      } else if (errno != EINTR) {
        return write_failure();
      }
    }
    return {};
  }

 protected:
  Status write_failure() const { return io_failure("writing", file_, std::strerror(errno)); }

 private:
  const File& file_;
};

#if defined(__linux__)

class DirectSink : public PlainSink {
 public:
  explicit DirectSink(const File& file) : PlainSink(file), direct_(reopen_direct(file.fd, O_WRONLY)) {}
  ~DirectSink() override { close_direct(); }
  DirectSink(const DirectSink&) = delete;

  // Whole pages directly, what is left over by a plain write. Some file systems open files for direct writes and then
  // refuse them with EINVAL: those get plain writes from then on.
  Status write(int64_t begin, int64_t bytes, const char* data) override {
    int64_t done = 0;
    while (direct_ >= 0 && done % kPage == 0 && bytes - done >= kPage) {
      const ssize_t put =
          pwrite(direct_, data + done, static_cast<size_t>(round_down(bytes - done, kPage)), begin + done);
      if (put > 0) {
        done += put;
      } else if (errno == EINVAL) {
        close_direct();
      } else if (errno != EINTR) {
        return write_failure();
      }
    }
    return PlainSink::write(begin + done, bytes - done, data + done);
  }

 private:
  void close_direct() {
    if (direct_ >= 0) close(direct_);
    direct_ = -1;
  }
  int direct_;
};

#endif

}  // namespace

std::unique_ptr<FileSink> open_sink(const File& file) {
#if defined(__linux__)
  if (!portable_io()) return std::make_unique<DirectSink>(file);
#endif
  return std::make_unique<PlainSink>(file);
}

FileWriter::FileWriter(const File& file, int64_t offset, int index, std::launch policy, const OnBlock& on_block)
    : file_(file),
      offset_(offset),
      index_(index),
      policy_(policy),
      on_block_(on_block),
      sink_(open_sink(file)),
      begin_(round_down(offset, kPage)),
      used_(offset - begin_) {}

Status FileWriter::open() {
  if (pread(file_.fd, filled_.data(), static_cast<size_t>(used_), begin_) == used_) return {};
  return io_failure("reading back", file_, std::strerror(errno));
}

Status FileWriter::wait() {
  const StageScope wait(Stage::wait_for_write);
  return pending_.valid() ? pending_.get() : Status{};
}

Status FileWriter::flush(bool last) {
  if (const Status status = wait(); !status) return status;
  const int64_t bytes = last ? used_ : round_down(used_, kPage), begin = begin_;
  const int64_t fresh = std::max(begin, offset_), end = std::max(fresh, begin + bytes);
  StageScope callback(Stage::callback);
  if (!on_block_(-1 - index_, fresh, filled_.data() + (fresh - begin), end - fresh)) return {Code::interrupted, {}};
  callback.close();
  std::memcpy(written_.data(), filled_.data() + bytes, static_cast<size_t>(used_ - bytes));
  std::swap(filled_, written_);
  begin_ += bytes, used_ -= bytes;
  pending_ = std::async(policy_, [this, begin, bytes] {
    const StageScope write(Stage::write);
    return sink_->write(begin, bytes, written_.data());
  });
  return last ? wait() : Status{};
}

}  // namespace refine_fast
