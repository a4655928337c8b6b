#include "core/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <future>
#include <memory>

#include "core/cpu.h"

namespace refine_fast {
namespace {

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20, kWindow = 4 * kHugePage;
constexpr const char* kShorter = "the file became shorter while it was read";

int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

Status failure(Code code, const char* doing, const std::string& name, const char* why) {
  Status status{code, {}};
  std::snprintf(status.message, sizeof status.message, "%s %s failed: %s", doing, name.c_str(), why);
  return status;
}

// A mapping of its own: malloc would keep freed pages, and a merge of ten parts would grow by a part's buffers. Huge pages from the first byte
// on, where the system grants them: stream.h says why. One more page can be written in front of the first byte.
struct Unmap {
  void* map = nullptr;
  size_t bytes = 0;
  void operator()(char*) const { munmap(map, bytes); }
};
using Buffer = std::unique_ptr<char, Unmap>;
Buffer page_aligned(int64_t bytes) {
  const size_t size = static_cast<size_t>(round_up(std::max(bytes, kPage), kPage) + kPage + kHugePage);
  void* const map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return {};
  const auto begin = reinterpret_cast<uintptr_t>(map) + kPage;
  char* const p = static_cast<char*>(map) + kPage + (-begin & (kHugePage - 1));
  madvise(p, static_cast<size_t>(round_down(bytes, kHugePage)), MADV_HUGEPAGE);
  return Buffer(p, Unmap{map, size});
}

struct ProcPath {
  char text[64];
  explicit ProcPath(int fd) { std::snprintf(text, sizeof text, "/proc/self/fd/%d", fd); }
};

// The file behind a descriptor once more, past the page cache; -1 where that cannot be (tmpfs, no /proc).
int reopen_direct(int fd, int mode) { return open(ProcPath(fd).text, mode | O_DIRECT | O_CLOEXEC); }

// Whether mincore tells of a file: to its owner and to who may write it. To others the kernel says that every page is resident.
bool residency_is_told(int fd) {
  struct stat file;
  if (fstat(fd, &file) == 0 && file.st_uid == geteuid()) return true;
  return faccessat(AT_FDCWD, ProcPath(fd).text, W_OK, AT_EACCESS) == 0;
}

// --- input: the window that a position lies in, and the next one on its way -----------------------------------------------------------

class Reader {
 public:
  Reader(const std::vector<File>& files, std::launch policy, const OnBlock& on_block) : files_(files), policy_(policy), on_block_(on_block) {}
  ~Reader() { close_file(); }
  Reader(const Reader&) = delete;

  bool ok() const { return now_.data && next_.data; }

  // *data, *bytes: what the window holds from `offset` on, at least `least` bytes
  Status at(int file, int64_t offset, int64_t least, const char** data, int64_t* bytes) {
    if (file != file_ || offset < begin_ || offset + least > now_.end) {
      const Status status = fill(file, offset, least);
      if (!status) return status;
    }
    *data = now_.bytes() + (offset - now_.begin);
    *bytes = now_.end - offset;
    return {};
  }

 private:
  struct Window {
    Buffer data = page_aligned(kWindow);  // what an element left in the window before goes to the page in front
    int64_t begin = 0, end = 0;
    Status status;
    char* bytes() const { return data.get(); }
  };

  Status fill(int file, int64_t offset, int64_t least) {
    if (file != file_)
      open_file(file);
    else if (pending_.valid())
      pending_.get();
    if (next_.end > 0 && offset <= next_.begin && offset + least > next_.begin && offset >= begin_) {
      const int64_t left = next_.begin - offset;
      std::memcpy(next_.bytes() - left, now_.bytes() + (offset - now_.begin), static_cast<size_t>(left));
      std::swap(now_, next_);
      begin_ = offset;
    } else {
      load(&now_, begin_ = round_down(offset, kPage));
    }
    if (!now_.status) return now_.status;
    if (offset + least > now_.end) return failure(Code::io, "reading", files_[static_cast<size_t>(file)].name, kShorter);
    next_.end = 0;
    if (now_.end < size_) pending_ = std::async(policy_, [this] { load(&next_, now_.end); });
    if (!on_block_(file, now_.begin, now_.bytes(), now_.end - now_.begin)) return {Code::interrupted, {}};
    return {};
  }

  void open_file(int file) {
    close_file();
    file_ = file;
    const int fd = files_[static_cast<size_t>(file)].fd;
    size_ = lseek(fd, 0, SEEK_END);
    direct_ = reopen_direct(fd, O_RDONLY);
    told_ = residency_is_told(fd);
    if (!told_) posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);  // see read_cached
    next_.end = 0;
  }

  void close_file() {
    pending_ = {};  // waits where a thread is at it
    if (direct_ >= 0) close(direct_);
    direct_ = -1;
  }

  // How many pages of a window are in the page cache; all of them where it cannot be told.
  static int64_t resident_pages(int fd, int64_t begin, int64_t end) {
    const int64_t pages = round_up(end - begin, kPage) / kPage;
    unsigned char resident[kWindow / kPage];
    void* map = mmap(nullptr, static_cast<size_t>(end - begin), PROT_READ, MAP_SHARED, fd, begin);
    if (map == MAP_FAILED) return pages;
    const bool told = mincore(map, static_cast<size_t>(end - begin), resident) == 0;
    munmap(map, static_cast<size_t>(end - begin));
    return told ? std::count_if(resident, resident + pages, [](unsigned char c) { return c & 1; }) : pages;
  }

  // Reads what is in the page cache; false where not all of it is. A miss has the kernel read ahead: hence the last byte of a window is tried
  // first, for one page.
  static bool read_cached(int fd, int64_t begin, int64_t bytes, char* data) {
    const iovec all = {data, static_cast<size_t>(bytes)};
    return preadv2(fd, &all, 1, begin, RWF_NOWAIT) == bytes;
  }

  // From the cache where the whole window is known to be in it, else past it: what was cached stays, what was not does not come in.
  void load(Window* w, int64_t begin) const {
    const File& f = files_[static_cast<size_t>(file_)];
    w->begin = begin, w->end = std::min(begin + kWindow, size_), w->status = {};
    if (w->end <= begin) return;
    if (!told_ && read_cached(f.fd, w->end - 1, 1, w->bytes()) && read_cached(f.fd, begin, w->end - begin, w->bytes())) return;
    const int64_t resident = told_ ? resident_pages(f.fd, begin, w->end) : 0;
    const bool warm = resident * kPage >= w->end - begin;
    int fd = warm || direct_ < 0 ? f.fd : direct_;
    for (int64_t at = begin; at < w->end;) {
      const ssize_t got = pread(fd, w->bytes() + (at - begin), static_cast<size_t>(begin + kWindow - at), at);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && errno == EINVAL && fd == direct_) {
        fd = f.fd;  // a file system that opens for direct reads and refuses them
      } else if (got <= 0) {
        w->status = failure(Code::io, "reading", f.name, got < 0 ? std::strerror(errno) : kShorter);
        return;
      } else {
        at += got;
      }
    }
    if (fd == f.fd && told_ && resident == 0) posix_fadvise(fd, begin, w->end - begin, POSIX_FADV_DONTNEED);
  }

  const std::vector<File>& files_;
  const std::launch policy_;
  const OnBlock& on_block_;
  int file_ = -1, direct_ = -1;
  bool told_ = false;
  int64_t size_ = 0, begin_ = 0;  // begin_: where now_ begins, with what an element left in the window before it
  Window now_, next_;
  std::future<void> pending_;
};

// --- output: one buffer being filled while the other is written past the cache ---------------------------------------------------------

class Writer {
 public:
  Writer(Output& output, int index, std::launch policy, const OnBlock& on_block)
      : output_(output), index_(index), policy_(policy), on_block_(on_block), begin_(round_down(output.offset, kPage)),
        used_(output.offset - begin_), direct_(reopen_direct(output.file.fd, O_WRONLY)) {}
  ~Writer() {
    pending_ = {};  // waits where a thread is at it
    if (direct_ >= 0) close(direct_);
  }
  Writer(const Writer&) = delete;

  // What the first page holds already is written again with it.
  Status open() {
    if (!data_ || !written_) return failure(Code::no_memory, "making", "the buffers of a merge", "no memory");
    if (pread(output_.file.fd, data_.get(), static_cast<size_t>(used_), begin_) == used_) return {};
    return failure(Code::io, "reading back", output_.file.name, std::strerror(errno));
  }
  char* tail() { return data_.get() + used_; }
  int64_t space() const { return kWindow - used_; }
  void advance(int64_t bytes) { used_ += bytes; }

  // Sends whole pages on their way; with `last` the rest too, and waits.
  Status flush(bool last) {
    if (pending_.valid())
      if (const Status status = pending_.get(); !status) return status;
    const int64_t bytes = last ? used_ : round_down(used_, kPage), begin = begin_;
    const int64_t fresh = std::max(begin, output_.offset), end = std::max(fresh, begin + bytes);
    if (!on_block_(-1 - index_, fresh, data_.get() + (fresh - begin), end - fresh)) return {Code::interrupted, {}};
    std::memcpy(written_.get(), data_.get() + bytes, static_cast<size_t>(used_ - bytes));
    std::swap(data_, written_);
    begin_ += bytes, used_ -= bytes;
    pending_ = std::async(policy_, [this, begin, bytes] { return write(begin, bytes); });
    return last ? pending_.get() : Status{};
  }

 private:
  Status write(int64_t begin, int64_t bytes) {
    const File& f = output_.file;
    for (int64_t done = 0; done < bytes;) {
      const int64_t whole = round_down(bytes - done, kPage);
      const bool direct = direct_ >= 0 && whole > 0 && done % kPage == 0;
      const ssize_t put = pwrite(direct ? direct_ : f.fd, written_.get() + done, static_cast<size_t>(direct ? whole : bytes - done), begin + done);
      if (put < 0 && errno == EINVAL && direct) {  // a file system that opens for direct writes and refuses them
        close(direct_);
        direct_ = -1;
      } else if (put < 0 && errno != EINTR) {
        return failure(Code::io, "writing", f.name, std::strerror(errno));
      } else if (put > 0) {
        done += put;
      }
    }
    return {};
  }

  Output& output_;
  const int index_;
  const std::launch policy_;
  const OnBlock& on_block_;
  Buffer data_ = page_aligned(kWindow), written_ = page_aligned(kWindow);
  int64_t begin_, used_;  // of data_: its place in the file, its bytes
  int direct_;
  std::future<Status> pending_;
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
  template <class Float>
  void add(int64_t element, int64_t n, Float* sum) {
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
              std::vector<Output>& outputs, bool overlap, const OnBlock& on_block) {
  const std::launch policy = overlap ? std::launch::async | std::launch::deferred : std::launch::deferred;
  Reader base(files, policy, on_block), tuned(files, policy, on_block);
  LowRankRows low_rank;
  std::deque<Writer> writers;
  if (!base.ok() || !tuned.ok()) return failure(Code::no_memory, "making", "the buffers of a merge", "no memory");
  for (size_t o = 0; o < outputs.size(); ++o)
    if (const Status status = writers.emplace_back(outputs[o], static_cast<int>(o), policy, on_block).open(); !status) return status;
  for (Output& o : outputs) o.changes.assign(pieces.size(), {});

  constexpr int64_t kLowRankBlock = 4096;
  float summed[kLowRankBlock];
  double summed_wide[kLowRankBlock];
  for (size_t p = 0; p < pieces.size(); ++p) {
    const Piece& piece = pieces[p];
    const int64_t base_bytes = storage_bytes(piece.base_type), tuned_bytes = storage_bytes(piece.tuned_type), out_bytes = storage_bytes(piece.out_type);
    if (piece.low_rank >= 0 && !low_rank.open(factors[static_cast<size_t>(piece.low_rank)]))
      return failure(Code::no_memory, "holding", "the factors of an adapter", "no memory");
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
        if (w.space() < out_bytes && !(status = w.flush(false))) return status;
        n = std::min(n, w.space() / out_bytes);
      }
      if (piece.low_rank >= 0) {
        n = std::min(n, kLowRankBlock);
        if (piece.base_type == Storage::f64) {
          std::memcpy(summed_wide, a, static_cast<size_t>(n) * 8);
          low_rank.add(done, n, summed_wide);
          b = reinterpret_cast<const char*>(summed_wide), b_type = Storage::f64;
        } else {
          storage_to_f32(piece.base_type, a, n, summed);
          low_rank.add(done, n, summed);
          b = reinterpret_cast<const char*>(summed), b_type = Storage::f32;
        }
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
    if (const Status status = w.flush(true); !status) return status;
  return {};
}

Status preallocate(const File& file, int64_t bytes) {
  if (bytes == 0 || fallocate(file.fd, FALLOC_FL_KEEP_SIZE, 0, bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return {};
  return failure(Code::io, "reserving disk space for", file.name, std::strerror(errno));
}

bool exchange_paths(const char* a, const char* b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0; }

}  // namespace refine_fast
