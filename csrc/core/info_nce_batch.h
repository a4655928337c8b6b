// What every solver of info_nce needs of a batch: its rows as float32, its norms, which columns are negatives, the
// private negatives, and the checks of what goes in and comes out.
//
// Private negatives. A query's own negatives are few: their scores and gradients are vector products in float32,
// beside the matrix products of the columns that all queries share.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/cpu.h"
#include "core/info_nce.h"
#include "core/memory.h"
#include "core/numeric.h"
#include "kernels/loss_kernels.h"

namespace refine_fast {

class InfoNCEBatch {
 protected:
  static constexpr float kEpsilon = 1e-12f;  // eps of torch.nn.functional.normalize
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // Of the width: the columns that a prefix adds to the one before.
  struct Range {
    int64_t begin, width;
  };
  // The private negatives of one query: under prefix m, score and weight of negative k are at [m * stride + k].
  struct Private {
    float *scores, *weights;
    int64_t stride;
  };
  // What a query's gradients are made of under one prefix, for c = its coefficient times the prefix's weight.
  struct Weights {
    float factor, positive;  // G_ij = factor exp((s_ij - top) / tau) of a negative; G of the positive
    float moment;            // sum_j G_ij s_ij
  };

  // scratch_floats: what load, score_private and finish_private may use, for each thread
  InfoNCEBatch(const InfoNCE& task, int64_t scratch_floats);

  // --- access
  float norm_q(int64_t m, int64_t i) const { return t_.normalize ? norm_q_[m * t_.rows + i] : 1.0f; }
  float norm_d(int64_t m, int64_t j) const { return t_.normalize ? norm_d_[m * t_.columns + j] : 1.0f; }
  float* scratch(int thread) const { return scratch_ + thread * scratch_floats_; }
  const void* at(const void* src, int64_t element) const {
    return static_cast<const char*>(src) + element * element_bytes_;
  }
  // rows begin .. begin + n as float32: the source itself, or `scratch`
  const float* load(const void* src, int64_t begin, int64_t n, float* scratch) const;
  // whether hard negative k of query i takes part
  bool is_used(int64_t i, int64_t k) const { return !t_.hard_mask || t_.hard_mask[i * t_.hards + k]; }

  // --- the batch
  bool stopped(int thread);
  void index_documents();
  Status check_inputs() const;
  Status check_losses() const;
  void inverse_norms(const float* x, int64_t stride, float* out) const;
  void find_norms();

  // --- one query, q as float32
  void score_private(int64_t i, const float* q, const Private& own, int thread) const;
  Weights softmax(int64_t i, int64_t m, double shift, const double sums[2]);
  void finish_private(int64_t i, const float* q, const Private& own, int thread) const;

  // the part of a gradient along x, which unit length removes: moment u / |x|, as a factor of x
  static float radial_part(float moment, float inverse_norm) {
    return inverse_norm < 1.0f / kEpsilon ? moment * inverse_norm * inverse_norm : 0.0f;
  }

  const InfoNCE& t_;
  const Kernels& isa_;
  const LossKernels& loss_;
  const bool gradients_, margin_;
  const float scale_;  // 1 / temperature
  const int64_t element_bytes_, directions_, prefixes_;
  const int64_t private_pitch_;  // of the private negatives of a query
  std::vector<Range> ranges_;    // by prefix
  std::atomic<bool> stopped_{false};
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();

  Buffer<float> norm_q_, norm_d_;  // inverse norms by prefix, if normalize
  Buffer<int32_t> ids_;            // dense document ids
  Buffer<double> tau_;             // by row: its part of the temperature's gradient

 private:
  Status check_rows(const char* name, const void* x, int64_t n, const uint8_t* mask) const;

  const int64_t scratch_floats_;  // of a thread
  Buffer<float> scratch_;
};

}  // namespace refine_fast
