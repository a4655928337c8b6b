#include "core/info_nce.h"

#include <algorithm>
#include <cstdio>
#include <new>
#include <numeric>
#include <vector>

#include "core/info_nce_fused.h"
#include "core/info_nce_solver.h"
#include "core/parallel.h"

namespace refine_fast {

// As many rows as keep all that grows with them within kStripBytes.
int64_t InfoNCESolver::rows_of_strip(const InfoNCE& t, int64_t pitch, int64_t private_pitch, const MatmulKernels& mm) {
  const int64_t packed = mm.element_bytes, width = t.width * (4 + packed + (t.coefficients ? packed : 0));
  const int64_t row_bytes = 4 * t.prefix_count * (pitch + 2 * private_pitch) + width + kBlock * (4 + 2 * packed);
  return std::min(std::clamp(kStripBytes / row_bytes, int64_t{mm.mr}, kMaxRows) / mm.mr * mm.mr,
                  round_up(t.rows, mm.mr));
}

const MatmulKernels& InfoNCESolver::product(const InfoNCE& t) {
  // f16 has too many digits for bf16
  return t.dtype == Dtype::bf16 ? *kernels().matmul_bf16 : *kernels().matmul_finite_f32;
}

bool InfoNCESolver::is_direct(const InfoNCE& t) {
  return t.dtype == Dtype::f32 || (t.dtype == Dtype::bf16 && product(t).pack_b_bf16 != nullptr);
}

int64_t InfoNCESolver::scratch_floats(const InfoNCE& t) {
  return std::max((is_direct(t) ? 0 : kBlock) * t.width, kPairs * (2 * t.width + kPairs));
}

InfoNCESolver::InfoNCESolver(const InfoNCE& t)
    : InfoNCEBatch(t, scratch_floats(t)),
      mm_(product(t)),
      direct_(is_direct(t)),
      blocks_(ceil_div(t.columns, kBlock)),
      pitch_(round_up(t.columns, 64) + 16),  // not a power of two: neighbouring rows get different cache sets
      strip_rows_(rows_of_strip(t, pitch_, private_pitch_, mm_)),
      document_bytes_(std::max(bytes_b(mm_, kBlock, t.width), bytes_b(mm_, t.width, kBlock))),
      column_moment_(t.normalize ? prefixes_ * t.columns : 0, 0.0f),
      strip_(prefixes_ * strip_rows_ * pitch_),
      hard_(prefixes_ * strip_rows_ * private_pitch_),
      hard_weight_(prefixes_ * strip_rows_ * private_pitch_),
      q_(t.dtype == Dtype::f32 ? 0 : strip_rows_ * t.width),
      rows_(prefixes_ * strip_rows_),
      packed_q_(prefixes_ * bytes_a(mm_, strip_rows_, mm_.kr) + bytes_a(mm_, strip_rows_, t.width)),
      packed_rows_(gradients_ ? bytes_b(mm_, t.width + prefixes_ * mm_.nr, strip_rows_) : 0),
      g_(gradients_ ? t.threads * strip_rows_ * kBlock : 0),
      packed_g_(gradients_ ? t.threads * g_bytes() : 0),
      documents_(t.threads * document_bytes_),
      parts_(gradients_ && t.symmetric ? t.threads * strip_rows_ : 0) {
  int64_t packed_q = 0, packed_rows = 0;
  for (const Range& range : ranges_) {
    slices_.push_back({range, packed_q, packed_rows});
    packed_q += bytes_a(mm_, strip_rows_, range.width);
    packed_rows += bytes_b(mm_, range.width, strip_rows_);
  }
  // The row kernels read beyond the last column; -inf is never a negative.
  for (int64_t r = 0; r < prefixes_ * strip_rows_; ++r)
    std::fill(strip_ + r * pitch_ + t.columns, strip_ + (r + 1) * pitch_, -kInfinity);
}

Status InfoNCESolver::run() {
  if (Status inputs = check_inputs(); !inputs) return inputs;
  if (t_.normalize) find_norms();
  index_documents();
  std::vector<Strip> strips;
  for (int64_t begin = 0; begin < t_.rows; begin += strip_rows_)
    strips.push_back({begin, std::min(strip_rows_, t_.rows - begin)});
  if (t_.symmetric) {
    index_pairs();
    score_pairs();
    for (const Strip& s : strips) {
      score_strip(s);
      sum_columns(s);
      if (stopped(0)) return Status{Code::interrupted};
    }
    finish_columns();
  }
  for (const Strip& s : strips) {
    score_strip(s);
    if (stopped(0)) return Status{Code::interrupted};
    {
      const StageScope softmax(Stage::softmax);
      parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { row_softmax(s, r, thread); });
    }
    if (!gradients_) continue;
    accumulate_gradients(s);
    const StageScope finish(Stage::finish);
    parallel_for(s.rows, t_.threads, [&](int64_t r, int thread) { finish_row(s, r, thread); });
  }
  const StageScope finish(Stage::finish);
  if (gradients_) {
    if (t_.normalize) parallel_for(t_.columns, t_.threads, [&](int64_t j, int thread) { finish_document(j, thread); });
    *t_.grad_temperature = static_cast<float>(std::accumulate(tau_ + 0, tau_ + t_.rows, 0.0));
  }
  return stopped(0) ? Status{Code::interrupted} : check_losses();
}

Status info_nce(const InfoNCE& task) {
  const StageScope setup(Stage::setup);
  try {
    return InfoNCEFused::serves(task) ? InfoNCEFused(task).run() : InfoNCESolver(task).run();
  } catch (const std::bad_alloc&) {
    Status status;
    status.code = Code::no_memory;
    std::snprintf(status.message, sizeof status.message,
                  "info_nce: no memory for the working buffers of %lld columns of width %lld",
                  static_cast<long long>(task.columns), static_cast<long long>(task.width));
    return status;
  }
}

}  // namespace refine_fast
