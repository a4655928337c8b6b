#include "core/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/cpu.h"

namespace refine_fast {
namespace {

constexpr int64_t kPage = 4096, kWindow = int64_t{8} << 20;

int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

Status failure(Code code, const char* doing, const std::string& name, const char* why) {
  Status status{code, {}};
  std::snprintf(status.message, sizeof status.message, "%s %s failed: %s", doing, name.c_str(), why);
  return status;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;
Buffer page_aligned(int64_t bytes) { return Buffer(static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(bytes)))); }

// --- input: the window that a position lies in, and read-ahead of the next -----------------------------------------------------------

// Pages that were in the cache before stay there; what this pass brought in goes when the window moves on.
class Reader {
 public:
  explicit Reader(const std::vector<File>& files, const OnBlock& on_block) : files_(files), on_block_(on_block), data_(page_aligned(kPage + kWindow)) {}
  ~Reader() { drop(); }

  bool ok() const { return data_ != nullptr; }
  bool cold() const { return cold_; }

  // *data, *bytes: what the window holds from `offset` on, at least `least` bytes
  Status at(int file, int64_t offset, int64_t least, const char** data, int64_t* bytes) {
    if (file != file_ || offset < begin_ || offset + least > end_) {
      const Status status = fill(file, offset, least);
      if (!status) return status;
    }
    *data = window() + (offset - window_begin_);
    *bytes = end_ - offset;
    return {};
  }

 private:
  char* window() const { return data_.get() + kPage; }

  struct Residency {
    int file = -1;
    int64_t begin = 0, pages = 0;
    unsigned char resident[kWindow / kPage];
  };

  // Which pages of a window are in the cache now. Where it cannot be told, all of them: nothing is dropped then.
  static void probe(const File& file, int index, int64_t begin, int64_t end, Residency* r) {
    r->file = index, r->begin = begin, r->pages = round_up(end - begin, kPage) / kPage;
    std::memset(r->resident, 1, sizeof r->resident);
    void* map = mmap(nullptr, static_cast<size_t>(end - begin), PROT_READ, MAP_SHARED, file.fd, begin);
    if (map == MAP_FAILED) return;
    if (mincore(map, static_cast<size_t>(end - begin), r->resident) != 0) std::memset(r->resident, 1, sizeof r->resident);
    munmap(map, static_cast<size_t>(end - begin));
  }

  Status fill(int file, int64_t offset, int64_t least) {
    drop();
    if (file != file_) {
      file_ = file;
      size_ = lseek(files_[static_cast<size_t>(file)].fd, 0, SEEK_END);
      next_.file = -1;
      posix_fadvise(files_[static_cast<size_t>(file)].fd, 0, 0, POSIX_FADV_RANDOM);  // the read-ahead below replaces the kernel's
    }
    const File& f = files_[static_cast<size_t>(file)];
    if (next_.file == file && offset <= end_ && offset + least > end_) {  // on to the next window; an element that straddles the two moves along
      std::memcpy(window() - (end_ - offset), window() + (offset - window_begin_), static_cast<size_t>(end_ - offset));
      begin_ = offset, window_begin_ = end_;
      now_ = next_;
      end_ = std::min(window_begin_ + kWindow, size_);
    } else {
      begin_ = window_begin_ = round_down(offset, kPage);
      end_ = std::min(window_begin_ + kWindow, size_);
      if (end_ > window_begin_) probe(f, file, window_begin_, end_, &now_);
    }
    if (offset + least > end_) return failure(Code::io, "reading", f.name, "the file became shorter while it was read");
    cold_ = std::memchr(now_.resident, 0, static_cast<size_t>(now_.pages)) != nullptr;
    next_.file = -1;
    if (end_ < size_) {
      const int64_t next_end = std::min(end_ + kWindow, size_);
      probe(f, file, end_, next_end, &next_);
      if (std::memchr(next_.resident, 0, static_cast<size_t>(next_.pages)) != nullptr)
        posix_fadvise(f.fd, end_, next_end - end_, POSIX_FADV_WILLNEED);
    }
    for (int64_t at = window_begin_; at < end_;) {
      const ssize_t got = pread(f.fd, window() + (at - window_begin_), static_cast<size_t>(end_ - at), at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return failure(Code::io, "reading", f.name, std::strerror(errno));
      if (got == 0) return failure(Code::io, "reading", f.name, "the file became shorter while it was read");
      at += got;
    }
    if (!on_block_(file, window_begin_, window(), end_ - window_begin_)) return {Code::interrupted, {}};
    return {};
  }

  void drop() {
    if (!cold_) return;
    const auto* r = now_.resident;
    for (int64_t i = 0; i < now_.pages;) {
      const unsigned char* cached = std::find(r + i, r + now_.pages, 1);
      if (cached != r + i) posix_fadvise(files_[static_cast<size_t>(now_.file)].fd, now_.begin + i * kPage, (cached - r - i) * kPage, POSIX_FADV_DONTNEED);
      i = std::find(cached, r + now_.pages, 0) - r;
    }
    cold_ = false;
  }

  const std::vector<File>& files_;
  const OnBlock& on_block_;
  Buffer data_;
  int file_ = -1;
  int64_t size_ = 0, begin_ = 0, window_begin_ = 0, end_ = 0;  // [begin_, window_begin_): what an element left in the window before
  bool cold_ = false;
  Residency now_, next_;
};

// --- output: one buffer, written when full; the disk starts on it at once -------------------------------------------------------------

class Writer {
 public:
  Writer(Output& output, int index, const OnBlock& on_block)
      : output_(output), index_(index), on_block_(on_block), data_(page_aligned(kWindow)), begin_(output.offset) {}

  bool ok() const { return data_ != nullptr; }
  char* tail() { return data_.get() + used_; }
  int64_t space() const { return kWindow - used_; }
  void advance(int64_t bytes) { used_ += bytes; }

  // `drop`: what was written before this buffer leaves the cache, as the cold input did
  Status flush(bool drop) {
    const File& f = output_.file;
    for (int64_t done = 0; done < used_;) {
      const ssize_t put = pwrite(f.fd, data_.get() + done, static_cast<size_t>(used_ - done), begin_ + done);
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) return failure(Code::io, "writing", f.name, std::strerror(errno));
      done += put;
    }
    sync_file_range(f.fd, begin_, used_, SYNC_FILE_RANGE_WRITE);
    if (drop && begin_ > behind_) {
      sync_file_range(f.fd, behind_, begin_ - behind_, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
      posix_fadvise(f.fd, behind_, begin_ - behind_, POSIX_FADV_DONTNEED);
    }
    behind_ = begin_;
    const bool go_on = on_block_(-1 - index_, begin_, data_.get(), used_);
    begin_ += used_, used_ = 0;
    return go_on ? Status{} : Status{Code::interrupted, {}};
  }

 private:
  Output& output_;
  int index_;
  const OnBlock& on_block_;
  Buffer data_;
  int64_t begin_, used_ = 0, behind_ = 0;
};

// --- LoRA: rows of base + B A, a tile of rows at a time ---------------------------------------------------------------------------------

class LowRankRows {
 public:
  // false where there is no memory for the factors
  bool open(const LowRankFactors& f) {
    f_ = f, row_ = -1;
    const MatmulKernels& k = *kernels().matmul_f32;
    const int64_t depth = round_up(f.rank, k.kr), panels = round_up(f.cols, k.nr) / k.nr;
    panel_bytes_ = round_up(depth * k.nr * k.element_bytes, 64);
    a_ = page_aligned(round_up(panels * panel_bytes_, kPage));
    b_ = page_aligned(round_up(depth * k.mr * k.element_bytes, kPage));
    stride_ = panels * k.nr;
    rows_ = page_aligned(round_up(k.mr * stride_ * 4, kPage));
    if (!a_ || !b_ || !rows_) return false;
    for (int64_t p = 0; p < panels; ++p)
      k.pack_b(f.a + p * k.nr, 1, f.cols, std::min<int64_t>(k.nr, f.cols - p * k.nr), f.rank, a_.get() + p * panel_bytes_);
    return true;
  }

  // sum[i] += (B A)[element + i]
  void add(int64_t element, int64_t n, float* sum) {
    const MatmulKernels& k = *kernels().matmul_f32;
    while (n > 0) {
      const int64_t row = element / f_.cols, col = element % f_.cols;
      if (row_ < 0 || row < row_ || row >= row_ + k.mr) compute(row);
      const int64_t m = std::min(n, f_.cols - col);
      const float* delta = reinterpret_cast<const float*>(rows_.get()) + (row - row_) * stride_ + col;
      for (int64_t i = 0; i < m; ++i) sum[i] += delta[i];
      element += m, sum += m, n -= m;
    }
  }

 private:
  void compute(int64_t row) {
    const MatmulKernels& k = *kernels().matmul_f32;
    row_ = row;
    k.pack_a(f_.b + row * f_.rank, f_.rank, 1, std::min<int64_t>(k.mr, f_.rows - row), f_.rank, b_.get());
    for (int64_t c = 0; c < stride_; c += k.nr)
      k.tile(b_.get(), a_.get() + c / k.nr * panel_bytes_, f_.rank, reinterpret_cast<float*>(rows_.get()) + c, stride_, false);
  }

  LowRankFactors f_{};
  Buffer a_, b_, rows_;
  int64_t panel_bytes_ = 0, stride_ = 0, row_ = -1;
};

}  // namespace

Status stream(const std::vector<File>& files, const std::vector<Piece>& pieces, const std::vector<LowRankFactors>& factors,
              std::vector<Output>& outputs, const OnBlock& on_block) {
  Reader base(files, on_block), tuned(files, on_block);
  LowRankRows low_rank;
  std::vector<Writer> writers;
  writers.reserve(outputs.size());
  for (size_t o = 0; o < outputs.size(); ++o) writers.emplace_back(outputs[o], static_cast<int>(o), on_block);
  if (!base.ok() || !tuned.ok() || !std::all_of(writers.begin(), writers.end(), [](const Writer& w) { return w.ok(); }))
    return {Code::no_memory, "no memory for the buffers of 8 MiB each that the merge needs"};
  for (Output& o : outputs) o.changes.assign(pieces.size(), {});

  constexpr int64_t kLowRankBlock = 4096;
  float summed[kLowRankBlock];
  for (size_t p = 0; p < pieces.size(); ++p) {
    const Piece& piece = pieces[p];
    const int64_t base_bytes = storage_bytes(piece.base_type), tuned_bytes = storage_bytes(piece.tuned_type), out_bytes = storage_bytes(piece.out_type);
    if (piece.low_rank >= 0 && !low_rank.open(factors[static_cast<size_t>(piece.low_rank)]))
      return {Code::no_memory, "no memory for the factors of a LoRA adapter's largest tensor"};
    for (int64_t done = 0; done < piece.count;) {
      const char *a = nullptr, *b = nullptr;
      Storage b_type = piece.tuned_type;
      int64_t n = piece.count - done, available = 0;
      Status status = base.at(piece.base_file, piece.base_offset + done * base_bytes, base_bytes, &a, &available);
      if (!status) return status;
      n = std::min(n, available / base_bytes);
      if (piece.tuned_file >= 0) {
        status = tuned.at(piece.tuned_file, piece.tuned_offset + done * tuned_bytes, tuned_bytes, &b, &available);
        if (!status) return status;
        n = std::min(n, available / tuned_bytes);
      }
      for (Writer& w : writers) {
        if (w.space() < out_bytes && !(status = w.flush(base.cold()))) return status;
        n = std::min(n, w.space() / out_bytes);
      }
      if (piece.low_rank >= 0) {
        n = std::min(n, kLowRankBlock);
        storage_to_f32(piece.base_type, a, n, summed);
        low_rank.add(done, n, summed);
        b = reinterpret_cast<const char*>(summed), b_type = Storage::f32;
      } else if (b == nullptr) {
        b = a, b_type = piece.base_type;
      }
      for (size_t o = 0; o < outputs.size(); ++o) {
        Writer& w = writers[o];
        Change* change = &outputs[o].changes[p];
        if (piece.base_type != Storage::raw) {
          lerp(piece.base_type, a, b_type, b, piece.out_type, w.tail(), n, outputs[o].weights[p], change);
        } else {
          std::memcpy(w.tail(), a, static_cast<size_t>(n));
          if (std::memcmp(a, b, static_cast<size_t>(n)) != 0)
            for (int64_t i = 0; i < n; ++i) change->differing += a[i] != b[i];
        }
        w.advance(n * out_bytes);
      }
      done += n;
    }
  }
  for (Writer& w : writers)
    if (const Status status = w.flush(base.cold()); !status) return status;
  return {};
}

Status preallocate(const File& file, int64_t bytes) {
  if (bytes == 0 || fallocate(file.fd, FALLOC_FL_KEEP_SIZE, 0, bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return {};
  return failure(Code::io, "reserving disk space for", file.name, std::strerror(errno));
}

bool exchange_paths(const char* a, const char* b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0; }

}  // namespace refine_fast
