// A persistent matrix product that stores no scores: the epilogue compares each score with its query's thresholds in
// registers, and most tiles write nothing at all.
//
//   s <  lo - e             certainly below the band                     dropped
//   s <  lo + e             perhaps in the band                          appended
//   s <  min(best, hi) - e  certainly in the band, certainly not chosen  counted
//   s <= hi + e             may be chosen, or lies at the upper edge     appended
//   s >  hi + e             above the band                               appended until `skip` are known, then dropped
//
// e is the margin of the query and of the panel of documents (band_topk.cu). The thresholds are rounded outwards and
// scaled like the scores.
//
// Roofline. 2 B N d FLOPs against N d elements, packed once for each block of queries. 100,000 queries x 10 M documents
// at d = 768 on an H100:
//     tensor cores   1.54e15 FLOPs at the data sheet's 989 TFLOP/s   1.6 s
//     memory                                                         0.02 s
// mma.sync, unlike wgmma, is known to reach some 62% of that rate there (and all of it on sm_80 to sm_89). A tile of
// 128 x 256 x 64 takes 48 KB from L2 for 4.2 MFLOPs: 5.9 TB/s at 500 TFLOP/s, about what L2 delivers. So the expected
// time is some 3 s. Predicted, not measured: 0.55 to 0.70 of cuBLAS's rate. wgmma waits for a measurement that asks for
// it. To be tried first: a fourth stage, for which sm_90 has room (202 of 227 KB); then, if the tensor cores themselves
// are the limit, wgmma m64n256k16 on the same stages: their 128 bytes a row and places c ^ (r % 8) are its 128-byte
// swizzle.
//
// The accumulator: 128 float32 sums and two sets of fragments a thread, 254 registers, one block a processor. So the
// operands and the thresholds of the next tile are copied while this one finishes. Warp tiles of 64 x 64 need 62% of
// shared memory's bandwidth at the full rate of mma.sync; 64 x 32 would need all of it. Comparing every score takes
// 1.5% of a tile's time; a band that holds a tenth of all documents costs some 10%.
//
// The sm_90a code of a step of 64, for each warp (no spill, 29 bytes a cycle from L2 at mma.sync's rate):
//     HMMA   LDSM   LDGSTS   all
//     128     32      12     some 240
#include <cuda_runtime.h>

#include "cuda/band_screen.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace refine_fast {
namespace {

constexpr int kTileM = 128, kScreenThreads = 256;
// Of a tile in shared memory: 8 chunks of 16 bytes, chunk c of row r at place c ^ (r % 8).
constexpr int kRowBytes = kTileK * 2;
constexpr int kRasterHeight = 16;  // tiles of queries that share their pass over the documents and stay in L2

template <int kTileN, int kStages>
struct ScreenShared {
  static constexpr int kDocs = kTileM * kRowBytes;  // offset of a stage's documents, behind its queries
  static constexpr int kStage = kDocs + kTileN * kRowBytes;
  static constexpr int kSlots = kStages + 1;                 // tiles whose edges are being copied or in use
  static constexpr int kSlot = (kTileM + 1) * sizeof(Edge);  // an edge for each query, and the panel
  static constexpr int kBytes = kStages * kStage + kSlots * kSlot;
};

// The coordinates of tile t: kRasterHeight tiles of queries at a time, documents slowly, queries fast.
__device__ void place(int64_t t, int tiles_m, int tiles_n, int& m, int& n) {
  const int64_t group = t / (static_cast<int64_t>(kRasterHeight) * tiles_n);
  const int first = static_cast<int>(group) * kRasterHeight, height = min(kRasterHeight, tiles_m - first);
  const int rest = static_cast<int>(t - group * kRasterHeight * tiles_n);
  m = first + rest % height, n = rest / height;
}

template <int kTileN, int kStages>
__global__ void __launch_bounds__(kScreenThreads, 1) screen_kernel(Screen p) {
  using Shared = ScreenShared<kTileN, kStages>;
  // 2 x 4 warps of 64 x kWarpN scores, each of mma tiles of 16 x 8
  constexpr int kWarpN = kTileN / 4, kTilesM = 4, kTilesN = kWarpN / 8;
  unsigned char* const stages = shared_memory();
  unsigned char* const slots = stages + kStages * Shared::kStage;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp_m = warp_id() % 2, warp_n = warp_id() / 2;
  const int tiles_m = (p.active_count + kTileM - 1) / kTileM, tiles_n = (p.end - p.begin + kTileN - 1) / kTileN;
  const int64_t tiles = static_cast<int64_t>(tiles_m) * tiles_n;
  if (blockIdx.x >= tiles) return;
  const int own = static_cast<int>((tiles - 1 - blockIdx.x) / gridDim.x) + 1, steps = p.width / kTileK;
  const auto query_of = [&](int place) {
    const int at = min(place, p.active_count - 1);
    return p.active == nullptr ? at : p.active[at];
  };

  // Each thread copies the same 16 bytes of every 32nd row, one step of kTileK at a time.
  int next_tile = 0, next_step = 0;
  const __half *a_from[kTileM / 32], *b_from = nullptr;
  const int row = tid / 8, chunk = tid % 8, to = row * kRowBytes + ((chunk ^ (row % 8)) << 4);
  const auto copy_step = [&](int stage) {
    if (next_tile < own) {
      if (next_step == 0) {
        int m, n;
        place(blockIdx.x + static_cast<int64_t>(next_tile) * gridDim.x, tiles_m, tiles_n, m, n);
#pragma unroll
        for (int i = 0; i < kTileM / 32; ++i)
          a_from[i] = p.queries + static_cast<int64_t>(query_of(m * kTileM + i * 32 + row)) * p.width + chunk * 8;
        b_from = p.docs + static_cast<int64_t>(p.begin + n * kTileN + row) * p.width + chunk * 8;
        unsigned char* const slot = slots + next_tile % Shared::kSlots * Shared::kSlot;
        if (tid < kTileM) copy_async(slot + tid * sizeof(Edge), p.edges + query_of(m * kTileM + tid));
        if (tid == kTileM) copy_async(slot + tid * sizeof(Edge), p.panels + (p.begin + n * kTileN) / kPanel);
      }
      unsigned char* const a = stages + stage * Shared::kStage + to;
#pragma unroll
      for (int i = 0; i < kTileM / 32; ++i) copy_async(a + i * 32 * kRowBytes, a_from[i] + next_step * kTileK);
#pragma unroll
      for (int i = 0; i < kTileN / 32; ++i)
        copy_async(a + Shared::kDocs + i * 32 * kRowBytes,
                   b_from + static_cast<int64_t>(i) * 32 * p.width + next_step * kTileK);
      if (++next_step == steps) next_step = 0, ++next_tile;
    }
    copy_async_commit();
  };

  // Fragments of 16 of the kTileK columns, two sets: one is loaded while the other is multiplied.
  uint32_t a[2][kTilesM][4], b[2][kTilesN / 2][4];
  float sums[kTilesM][kTilesN][4] = {};
  const int a_row = warp_m * 64 + lane % 16, b_row = warp_n * kWarpN + lane % 8 + lane / 16 * 8;
  const int a_at = a_row * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
  const int b_at = Shared::kDocs + b_row * kRowBytes + ((lane / 8 % 2 ^ lane % 8) << 4);
  const auto load_fragments = [&](int set, int stage, int k) {
    const unsigned char* const from = stages + stage * Shared::kStage;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) load_matrices(a[set][i], from + ((a_at + i * 16 * kRowBytes) ^ (k << 5)));
#pragma unroll
    for (int i = 0; i < kTilesN / 2; ++i) load_matrices(b[set][i], from + ((b_at + i * 16 * kRowBytes) ^ (k << 5)));
  };
  const auto multiply = [&](int set) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
        multiply_add(sums[i][j], a[set][i], b[set][j / 2][j % 2 * 2], b[set][j / 2][j % 2 * 2 + 1]);
  };

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) copy_step(stage);
  copy_async_wait<kStages - 2>();
  __syncthreads();
  load_fragments(0, 0, 0);
  int stage = 0, free_stage = kStages - 1;
  for (int tile = 0; tile < own; ++tile) {
    for (int step = 0; step < steps; ++step) {
      const int next_stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < 3) {
          load_fragments((k + 1) % 2, stage, k + 1);
        } else {
          copy_async_wait<kStages - 2>();
          __syncthreads();  // for every thread the next stage has arrived, and this one is no longer read
          load_fragments(0, next_stage, 0);
        }
        if (k == 0) copy_step(free_stage);
        multiply(k % 2);
      }
      free_stage = stage, stage = next_stage;
    }

    // Of each mma tile a thread holds two neighbouring columns of rows lane / 4 and lane / 4 + 8.
    int m, n;
    place(blockIdx.x + static_cast<int64_t>(tile) * gridDim.x, tiles_m, tiles_n, m, n);
    const unsigned char* const slot = slots + tile % Shared::kSlots * Shared::kSlot;
    const Panel panel = *reinterpret_cast<const Panel*>(slot + kTileM * sizeof(Edge));
    const int first_column = p.begin + n * kTileN, own_column = first_column + warp_n * kWarpN + lane % 4 * 2;
    const auto column_of = [&](int element) { return own_column + element / 2 * 8 + element % 2; };
    uint32_t tally[2] = {};  // how many were counted, one byte for each row
#pragma unroll
    for (int r = 0; r < 2 * kTilesM; ++r) {
      const auto score = [&](int element) { return sums[r / 2][element / 2][r % 2 * 2 + element % 2]; };
      const int tile_row = warp_m * 64 + r * 8 + lane / 4;
      const Edge edge = *reinterpret_cast<const Edge*>(slot + tile_row * sizeof(Edge));
      const float e = __fadd_ru(__fadd_ru(__fmul_ru(edge.residual, panel.size), __fmul_ru(edge.reach, panel.residual)),
                                __fmul_ru(__fmul_ru(p.sum, edge.reach), __fadd_ru(panel.size, panel.residual)));
      const float scale = edge.scale * panel.scale, floor = __fmul_rd(__fsub_rd(edge.low, e), scale);
      float most = score(0);
#pragma unroll
      for (int i = 1; i < 2 * kTilesN; ++i) most = fmaxf(most, score(i));
      if (most < floor || m * kTileM + tile_row >= p.active_count) continue;

      const int query = query_of(m * kTileM + tile_row);
      const Query& state = p.states[query];
      const float sure = __fmul_ru(__fadd_ru(p.low, e), scale),
                  keep = fmaxf(sure, __fmul_rd(__fsub_rd(state.best, e), scale));
      const float ceil = __fmul_ru(__fadd_ru(state.top, e), scale);
      uint32_t counted = 0, appended = 0;
#pragma unroll
      for (int i = 0; i < 2 * kTilesN; ++i) {
        const float s = score(i);
        if (s >= floor && column_of(i) < p.end) {
          if (s >= sure && s < keep)
            counted |= 1u << i;
          else if (s <= ceil)
            appended |= 1u << i;
        }
      }
      if (state.excluded < p.first_id + first_column + kTileN) {
        const int64_t end = p.exclude.offsets[query + 1];
        for (uint32_t left = counted | appended; left != 0; left &= left - 1) {
          const int64_t id = p.first_id + column_of(__ffs(static_cast<int>(left)) - 1);
          const int64_t at = lower_bound(p.exclude.ids, state.excluded_at, end, id);
          if (at < end && p.exclude.ids[at] == id) counted &= ~(left & -left), appended &= ~(left & -left);
        }
      }
      if (p.random)
        for (uint32_t left = counted; left != 0; left &= left - 1)
          if (hash(state, p.first_id + column_of(__ffs(static_cast<int>(left)) - 1)) <= state.last_hash) {
            counted &= ~(left & -left), appended |= left & -left;
          }
      tally[r / 4] += static_cast<uint32_t>(__popc(counted)) << (r % 4 * 8);
      if (appended != 0) {
        int at = atomicAdd(p.found + query, __popc(appended));
        for (; appended != 0 && at < p.capacity; appended &= appended - 1)
          p.candidates[static_cast<int64_t>(query) * p.capacity + at++] =
              column_of(__ffs(static_cast<int>(appended)) - 1);
      }
    }
    // The four lanes of a row add up; each writes two of the eight rows.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tally[half] += __shfl_xor_sync(kWholeWarp, tally[half], 1);
      tally[half] += __shfl_xor_sync(kWholeWarp, tally[half], 2);
      const int count = tally[half] >> (lane % 4 * 8) & 0xff,
                tile_row = warp_m * 64 + (half * 4 + lane % 4) * 8 + lane / 4;
      if (count != 0) atomicAdd(p.counted + query_of(m * kTileM + tile_row), count);
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i][j][c] = 0;
  }
}

}  // namespace

// Takes the larger tile if the device's shared memory holds it: 227 KB a block on sm_90, 163 on sm_80, but 99 on other
// sm_8x. Two steps of 1,000 to 2,000 cycles are then being copied while a third is multiplied, which covers L2's
// latency.
cudaError_t launch_screen(const Screen& screen, void* stream) {
  int device = 0, processors = 0, shared = 0;
  REFINE_FAST_TRY(cudaGetDevice(&device));
  REFINE_FAST_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  REFINE_FAST_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  using Large = ScreenShared<256, 3>;
  using Small = ScreenShared<128, 2>;
  if (shared >= Large::kBytes)
    return launch(screen_kernel<256, 3>, processors, kScreenThreads, Large::kBytes, stream, screen);
  return launch(screen_kernel<128, 2>, processors, kScreenThreads, Small::kBytes, stream, screen);
}

}  // namespace refine_fast
