#include "core/best_of_groups.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <vector>

#include "core/cpu.h"
#include "core/matmul.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/stages.h"
#include "kernels/loss_kernels.h"

namespace refine_fast {
namespace {

constexpr int64_t kMostFew = 12;  // queries that take no tile, at the level with the widest
constexpr int64_t kPrefetchRows = 4;
constexpr int64_t kColumns = 64;                // queries at a time, a multiple of every tile's columns
constexpr int64_t kStrip = 48;                  // rows at a time, a multiple of every tile's rows
constexpr int64_t kPieceBytes = 512 << 10;      // packed rows in L2
constexpr int64_t kLargestPiece = 21 * kStrip;  // rows; bounds what the groups of a piece take

class Search {
 public:
  explicit Search(const BestOfGroups& task)
      : task_(task),
        kernels_(kernels()),
        matmul_(*kernels_.matmul_f32),
        few_(task.count <= few(matmul_)),
        piece_(std::clamp(kPieceBytes / bytes_a(matmul_, kStrip, task.d), int64_t{1}, kLargestPiece / kStrip) * kStrip),
        threads_(std::max(task.threads, 1)),
        packed_queries_(few_ ? 0 : bytes_b(matmul_, task.count, task.d)),
        packed_rows_(few_ ? 0 : threads_ * piece_bytes()),
        floats_(threads_ * thread_floats()) {}

  Status run() {
    using Clock = std::chrono::steady_clock;
    if (!few_) {
      const StageScope pack(Stage::pack);
      pack_b(matmul_, task_.queries, task_.d, 1, task_.count, task_.d, packed_queries_.data());
    }
    std::vector<int64_t> starts{0};  // of each task's groups: as many as a piece holds, at least one
    while (starts.back() < task_.groups) {
      const int64_t* const begin = task_.offsets + starts.back();
      const int64_t* const end = std::upper_bound(begin, task_.offsets + task_.groups + 1, *begin + piece_);
      starts.push_back(std::max<int64_t>(starts.back() + 1, end - 1 - task_.offsets));
    }
    std::atomic<bool> stopped{false};
    Clock::time_point asked = Clock::now();
    const StageScope multiply(Stage::multiply);
    parallel_for(static_cast<int64_t>(starts.size()) - 1, threads_, [&](int64_t index, int thread) {
      if (thread == 0 && task_.poll.go_on != nullptr && Clock::now() - asked > std::chrono::milliseconds(50)) {
        if (!task_.poll.go_on(task_.poll.context)) stopped = true;
        asked = Clock::now();
      }
      if (stopped.load(std::memory_order_relaxed)) return;
      const int64_t first = starts[index], last = starts[index + 1];
      if (few_)
        one_by_one(first, last, thread);
      else
        in_tiles(first, last, thread);
    });
    return stopped ? Status{Code::interrupted} : Status{};
  }

 private:
  static int64_t few(const MatmulKernels& matmul) { return std::min<int64_t>(kMostFew, matmul.nr * 3 / 8); }
  int64_t piece_bytes() const { return bytes_a(matmul_, piece_, task_.d); }
  // the folded scores of a piece's groups, the scores of a strip, rows that were converted
  int64_t thread_floats() const {
    return few_ ? round_up(task_.d, 16) : (piece_ + kStrip) * kColumns + round_up(kStrip * task_.d, 16);
  }
  int64_t row_of(int64_t group) const { return task_.offsets[group] - task_.offsets[0]; }

  // `rows` rows from `first` in float32, and their stride: in place, or converted
  const float* floats(int64_t first, int64_t rows, float* converted, int64_t& stride) const {
    const int64_t row_bytes = task_.row_stride * (task_.dtype == Dtype::f32 ? 4 : 2);
    const char* source = static_cast<const char*>(task_.rows) + first * row_bytes;
    if (task_.dtype == Dtype::f32) {
      stride = task_.row_stride;
      return reinterpret_cast<const float*>(source);
    }
    for (int64_t r = 0; r < rows; ++r)
      kernels_.to_f32(source + r * row_bytes, task_.dtype, task_.d, converted + r * task_.d);
    stride = task_.d;
    return converted;
  }

  void prefetch(int64_t row) const {
    const int64_t row_bytes = task_.row_stride * (task_.dtype == Dtype::f32 ? 4 : 2);
    const char* source = static_cast<const char*>(task_.rows) + row * row_bytes;
    for (int64_t byte = 0; byte < task_.d * 4; byte += 64) __builtin_prefetch(source + byte);
  }

  // NaN stays: no comparison with it is true
  static void fold(const float* scores, int64_t n, float* best) {
    for (int64_t i = 0; i < n; ++i) {
      const float s = scores[i];
      best[i] = ((s > best[i]) | (s != s)) ? s : best[i];
    }
  }

  void one_by_one(int64_t first, int64_t last, int thread) const {
    float* const converted = floats_ + thread * thread_floats();
    int64_t stride = 0;
    for (int64_t group = first; group < last; ++group) {
      float best[kMostFew];
      std::fill_n(best, kMostFew, -std::numeric_limits<float>::infinity());
      for (int64_t row = row_of(group); row < row_of(group + 1); ++row) {
        prefetch(row + kPrefetchRows);
        const float* x = floats(row, 1, converted, stride);
        float scores[kMostFew];
        for (int64_t q = 0; q < task_.count; ++q)
          scores[q] = kernels_.loss->dot(task_.queries + q * task_.d, x, task_.d);
        fold(scores, task_.count, best);
      }
      for (int64_t q = 0; q < task_.count; ++q) task_.best[q * task_.best_stride + group] = best[q];
    }
  }

  void in_tiles(int64_t first, int64_t last, int thread) const {
    char* const packed = packed_rows_ + thread * piece_bytes();
    float* const folded = floats_ + thread * thread_floats();
    float* const scores = folded + piece_ * kColumns;
    float* const converted = scores + kStrip * kColumns;
    // one piece, unless a single group has more rows
    for (int64_t begin = row_of(first); begin < row_of(last); begin += piece_) {
      const int64_t end = std::min(begin + piece_, row_of(last));
      for (int64_t row = begin; row < end; row += kStrip) {
        const int64_t rows = std::min(kStrip, end - row);
        int64_t stride = 0;
        const float* source = floats(row, rows, converted, stride);
        pack_a(matmul_, source, stride, 1, rows, task_.d, packed + bytes_a(matmul_, row - begin, task_.d));
      }
      for (int64_t query = 0; query < task_.count; query += kColumns) {
        const int64_t queries = std::min(kColumns, task_.count - query);
        float* const best = task_.best + query * task_.best_stride + first;
        std::fill_n(folded, (last - first) * kColumns, -std::numeric_limits<float>::infinity());
        if (begin > row_of(first))
          for (int64_t q = 0; q < queries; ++q) folded[q] = best[q * task_.best_stride];
        int64_t group = first;
        for (int64_t row = begin; row < end; row += kStrip) {
          const int64_t rows = std::min(kStrip, end - row);
          matmul(matmul_, packed + bytes_a(matmul_, row - begin, task_.d),
                 packed_queries_ + bytes_b(matmul_, query, task_.d), rows, queries, task_.d, scores, kColumns, false);
          for (int64_t r = 0; r < rows; ++r) {
            if (row + r == row_of(group + 1)) ++group;
            fold(scores + r * kColumns, queries, folded + (group - first) * kColumns);
          }
        }
        for (int64_t q = 0; q < queries; ++q)
          for (int64_t g = 0; g < last - first; ++g) best[q * task_.best_stride + g] = folded[g * kColumns + q];
      }
    }
  }

  const BestOfGroups& task_;
  const Kernels& kernels_;
  const MatmulKernels& matmul_;
  const bool few_;
  const int64_t piece_;  // rows
  const int threads_;
  const Buffer<char> packed_queries_, packed_rows_;
  const Buffer<float> floats_;
};

}  // namespace

Status best_of_groups(const BestOfGroups& task) { return task.count == 0 ? Status{} : Search(task).run(); }

}  // namespace refine_fast
