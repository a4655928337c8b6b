#include "core/merge.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <future>
#include <new>

#include "core/file_reader.h"
#include "core/file_writer.h"
#include "core/stages.h"

namespace refine_fast {
namespace {

constexpr int64_t kLowRankBlock = 4096;  // elements of base + B A at a time

class Merge {
 public:
  Merge(const std::vector<File>& files, const std::vector<LowRankFactors>& factors, std::vector<Output>& outputs,
        bool overlap, const OnBlock& on_block)
      : policy_(overlap ? std::launch::async | std::launch::deferred : std::launch::deferred),
        factors_(factors),
        outputs_(outputs),
        base_(files, policy_, on_block),
        tuned_(files, policy_, on_block) {
    for (size_t o = 0; o < outputs.size(); ++o)
      writers_.emplace_back(outputs[o].file, outputs[o].offset, static_cast<int>(o), policy_, on_block);
  }

  Status run(const std::vector<Piece>& pieces) {
    for (FileWriter& writer : writers_)
      if (const Status status = writer.open(); !status) return status;
    for (Output& output : outputs_) output.changes.assign(pieces.size(), {});
    for (size_t p = 0; p < pieces.size(); ++p)
      if (const Status status = merge_piece(pieces[p], p); !status) return status;
    for (FileWriter& writer : writers_)
      if (const Status status = writer.flush(true); !status) return status;
    return {};
  }

 private:
  Status merge_piece(const Piece& piece, size_t index) {
    const int64_t base_bytes = storage_bytes(piece.base_type), tuned_bytes = storage_bytes(piece.tuned_type);
    const int64_t out_bytes = storage_bytes(piece.out_type);
    if (piece.low_rank >= 0) low_rank_.open(factors_[static_cast<size_t>(piece.low_rank)]);
    for (int64_t done = 0; done < piece.count;) {
      const char *a = nullptr, *b = nullptr;
      Storage b_type = piece.tuned_type;
      int64_t n = piece.count - done, available = 0;
      Status status = base_.at(piece.base_file, piece.base_offset + done * base_bytes, base_bytes, &a, &available);
      if (!status) return status;
      n = std::min(n, available / base_bytes);
      if (piece.tuned_file >= 0) {
        status = tuned_.at(piece.tuned_file, piece.tuned_offset + done * tuned_bytes, tuned_bytes, &b, &available);
        if (!status) return status;
        n = std::min(n, available / tuned_bytes);
      }
      for (FileWriter& writer : writers_) {
        if (writer.space() < out_bytes && !(status = writer.flush(false))) return status;
        n = std::min(n, writer.space() / out_bytes);
      }
      if (piece.low_rank >= 0) {
        n = std::min(n, kLowRankBlock);
        b = add_low_rank(piece.base_type, a, done, n, &b_type);
      } else if (b == nullptr) {
        b = a, b_type = piece.base_type;
      }
      for (size_t o = 0; o < outputs_.size(); ++o) {
        FileWriter& writer = writers_[o];
        Change* change = &outputs_[o].changes[index];
        if (piece.base_type == Storage::raw)
          copy(a, b, n, writer.tail(), change);
        else
          lerp(piece.base_type, a, b_type, b, piece.out_type, writer.tail(), n, outputs_[o].weights[index], change);
        writer.advance(n * out_bytes);
      }
      done += n;
    }
    return {};
  }

  // Elements `first` .. first + n of base + B A, in float64 if base is, else in float32; valid until the next call.
  const char* add_low_rank(Storage base_type, const char* base, int64_t first, int64_t n, Storage* type) {
    if (base_type == Storage::f64) {
      std::memcpy(sum_f64_, base, static_cast<size_t>(n) * 8);
      low_rank_.add(first, n, sum_f64_);
      *type = Storage::f64;
      return reinterpret_cast<const char*>(sum_f64_);
    }
    storage_to_f32(base_type, base, n, sum_f32_);
    low_rank_.add(first, n, sum_f32_);
    *type = Storage::f32;
    return reinterpret_cast<const char*>(sum_f32_);
  }

  static void copy(const char* base, const char* tuned, int64_t n, char* out, Change* change) {
    std::memcpy(out, base, static_cast<size_t>(n));
    if (std::memcmp(base, tuned, static_cast<size_t>(n)) != 0)
      for (int64_t i = 0; i < n; ++i) change->differing += base[i] != tuned[i];
  }

  const std::launch policy_;
  const std::vector<LowRankFactors>& factors_;
  std::vector<Output>& outputs_;
  FileReader base_, tuned_;
  std::deque<FileWriter> writers_;
  LowRankRows low_rank_;
  alignas(64) float sum_f32_[kLowRankBlock];
  alignas(64) double sum_f64_[kLowRankBlock];
};

}  // namespace

Status merge(const std::vector<File>& files, const std::vector<Piece>& pieces,
             const std::vector<LowRankFactors>& factors, std::vector<Output>& outputs, bool overlap,
             const OnBlock& on_block) {
  const StageScope compute(Stage::compute);
  try {
    return Merge(files, factors, outputs, overlap, on_block).run(pieces);
  } catch (const std::bad_alloc&) {
    Status status{Code::no_memory, {}};
    std::snprintf(status.message, sizeof status.message, "fuse: no memory for the buffers of a merge");
    return status;
  }
}

}  // namespace refine_fast
