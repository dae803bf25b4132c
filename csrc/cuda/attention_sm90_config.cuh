// The Hopper attention's sizes, its shared memory, and the rings by which its warps hand jobs and tiles to each other.
#pragma once

#include <array>

#include "cuda/attention_job.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/swizzle.cuh"
#include "cuda/ptx/tensor_map.cuh"
#include "tilestream/attention_tiles.h"

namespace tilestream::cuda {

constexpr int kGroupThreads = 128, kGroupRows = 64;  // of a warpgroup
// A panel: 64 columns of 16 bits of some rows, 128 bytes a row, as the 128-byte swizzle has them.
constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

// Warps of the loading warpgroup. The rest of the block: wide warpgroups, then the narrow one.
enum LoadWarp : int { kLoadWide = 0, kLoadNarrow = 1, kRepairWide = 2, kConvertWide = 2 };
constexpr int kConvertWarps = 2;  // from kConvertWide on
// Named barriers of the block.
enum BarrierId : int { kTurn = 1, kGroup = 5 };  // + index of the wide warpgroup

// T: element of the products, __half, __nv_bfloat16 or __nv_fp8_e4m3. KV: what the cache stores. kTile: row of kAttentionTiles.
template <class T_, class KV_, int kTile>
struct Sm90Config {
  using T = T_;
  using KV = KV_;
  static constexpr AttentionTile kSizes = kAttentionTiles[kTile];
  static constexpr int kDimQk = kSizes.dim_qk, kDimVo = kSizes.dim_vo, kKeys = kSizes.tile_keys, kStages = kSizes.stages;
  static constexpr int kGroups = kSizes.wide_groups, kRows = kSizes.wide_rows();
  static constexpr bool kNarrow = kSizes.narrow_rows > 0;
  static constexpr int kThreads = kSizes.num_groups() * kGroupThreads;
  static constexpr bool kConverted = kSizes.kind == TileKind::kConverted, kFloat8 = kSizes.kind == TileKind::kFloat8;
  static constexpr bool kHasScales = kIsQuantised<KV>;
  // Rows of a panel of q, K and V; of e4m3 and a head dim of 64 half as long as others, in the pattern of that length.
  static constexpr int kRowBytes = kDimQk * int(sizeof(T)) < kPanelRowBytes ? 64 : kPanelRowBytes;
  static constexpr ptx::Swizzle kSwizzle = kRowBytes == 64 ? ptx::Swizzle::k64 : ptx::Swizzle::k128;
  static constexpr int kPanelsQk = int(ceil_div(kDimQk * sizeof(T), kRowBytes)),
                       kPanelsVo = int(ceil_div(kDimVo * sizeof(T), kRowBytes));
  static constexpr int kPanelBytes = kKeys * kRowBytes;  // of a K or V tile
  static_assert(kKeys % 64 == 0, "a tile is whole pages of up to 64 tokens");
  // One product of the tensor cores: 32 bytes along k.
  static constexpr int kStepsQk = kDimQk * int(sizeof(T)) / 32, kStepsVo = kKeys * int(sizeof(T)) / 32;
  // Warps that make a stage full. Those of V read the wide lane's jobs, beside the warpgroups.
  static constexpr int kFillingK = kConverted ? kConvertWarps : 1, kFillingV = kConverted || kFloat8 ? kConvertWarps : 1;
  // Tiles on their way to be converted: 32 KB of K and V, and scales.
  static constexpr int kRawRowBytes = kDimQk * kKvBits<KV> / 8;
  static constexpr int kRawStages = kConverted ? 32 * 1024 / (2 * kKeys * kRawRowBytes) : 1;
  static_assert(kSizes.kind == TileKind::kDirect || kDimQk == kDimVo, "K and V are brought by the same code");
  // A row's weights are relative to a maximum that lags by up to 2^kLazyLog2, and are kept times 2^kWeightLog2. 16 bits: sums of
  // 2^7 weights stay below float16's largest number. e4m3 ends at 448 and is normal from 2^-6 on: weights up to 2^8, and of
  // the largest of a row at least 2^6, so that those 2^12 times smaller keep all bits, and those 2^15 times smaller count.
  static constexpr float kLazyLog2 = kFloat8 ? 2.0f : 8.0f, kWeightLog2 = kFloat8 ? 6.0f : 0.0f;
};

// The keys of a row tile, in whole tiles; the last may end before keys_end.
struct RowTile {
  int row_begin, keys_begin, keys_end;
};
template <class C>
__device__ __forceinline__ RowTile row_tile(const Job& job, int row_begin) {
  const int last = min(row_begin + C::kRows, job.num_rows) - 1;
  return {row_begin, job.keys_begin(row_begin) / C::kKeys * C::kKeys, job.keys_end(last)};
}
// Calls run(RowTile) for each of a job.
template <class C, class Run>
__device__ __forceinline__ void for_each_row_tile(const Job& job, Run run) {
  for (int row = 0; row < job.num_rows; row += C::kRows) run(row_tile<C>(job, row));
}
// Calls run(tile) for each tile of each of them, by its first key.
template <class C, class Run>
__device__ __forceinline__ void for_each_tile(const Job& job, Run run) {
  for_each_row_tile<C>(job, [&](const RowTile& rows) {
    for (int tile = rows.keys_begin; tile < rows.keys_end; tile += C::kKeys) run(tile);
  });
}
// Whether the tile holds tokens that the job does not own: they may be NaN.
template <class C>
__device__ __forceinline__ bool has_foreign_keys(const Job& job, int tile) {
  return tile + C::kKeys > job.at.kv_end && job.offset(job.at.kv_end) != 0;
}

// Which of a ring's stages is next, and the parity of its barriers' phase for one who waits until it is full; until it is
// empty, the other.
template <int kStages>
class RingPosition {
  static_assert((kStages & (kStages - 1)) == 0);

 public:
  __device__ __forceinline__ unsigned stage() const { return count_ % kStages; }
  __device__ __forceinline__ unsigned full_parity() const { return count_ / kStages % 2; }
  __device__ __forceinline__ unsigned empty_parity() const { return full_parity() ^ 1; }
  __device__ __forceinline__ void advance() { ++count_; }
  __device__ __forceinline__ RingPosition next() const {
    RingPosition after = *this;
    after.advance();
    return after;
  }

 private:
  unsigned count_ = 0;
};

// A lane's jobs, two at once: the warp that loads their keys publishes them, all other warps of the lane read them. A job
// without tokens is the end.
struct JobRing {
  static constexpr int kJobs = 2;
  Job jobs[kJobs];
  uint64_t full[kJobs], empty[kJobs];

  __device__ __forceinline__ void init(unsigned num_reading_warps) {
    for (int i = 0; i < kJobs; ++i) ptx::mbarrier_init(&full[i], 1), ptx::mbarrier_init(&empty[i], num_reading_warps);
  }
};

// One warp. Calls run(job) for each job of this block in lists [begin, end), then publishes the end.
template <class Run>
__device__ __forceinline__ void publish_jobs(const AttentionParams& p, JobRing& ring, int lists_begin, int lists_end, Run run) {
  RingPosition<JobRing::kJobs> at;
  const bool first_lane = threadIdx.x % kWarpSize == 0;
  const auto publish = [&](auto write) {
    Job& job = ring.jobs[at.stage()];
    ptx::mbarrier_wait_parity(&ring.empty[at.stage()], at.empty_parity());
    if (first_lane) write(job);
    __syncwarp();
    if (first_lane) ptx::mbarrier_arrive(&ring.full[at.stage()]);
    at.advance();
    return &job;
  };
  for (int list = lists_begin + int(blockIdx.x); list < lists_end; list += int(gridDim.x)) {
    for (int j = p.plan.worker_begin()[list]; j < p.plan.worker_begin()[list + 1]; ++j)
      run(*publish([&](Job& job) { job.load(p, j); }));
  }
  publish([](Job& job) { job.num_rows = 0; });
}

// One warp, each on its own. Calls run(job) for each published job.
template <class Run>
__device__ __forceinline__ void read_jobs(JobRing& ring, Run run) {
  RingPosition<JobRing::kJobs> at;
  for (;;) {
    ptx::mbarrier_wait_parity(&ring.full[at.stage()], at.full_parity());
    const Job& job = ring.jobs[at.stage()];
    if (job.num_rows == 0) return;
    run(job);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&ring.empty[at.stage()]);
    at.advance();
  }
}

// Tiles of K and V between the warps that bring them and those that multiply.
template <class C>
struct WideStorage {
  alignas(1024) unsigned char q[C::kGroups][C::kPanelsQk * kGroupRows * C::kRowBytes];
  alignas(1024) unsigned char k[C::kStages][C::kPanelsQk * C::kPanelBytes];
  alignas(1024) unsigned char v[C::kStages][C::kPanelsVo * C::kPanelBytes];  // of e4m3: a row for each column of V
  uint64_t k_full[C::kStages], k_empty[C::kStages];
  uint64_t v_full[C::kStages], v_empty[C::kStages];
  uint64_t v_landed[C::kStages];  // of a tile that is repaired before it is full
  JobRing jobs;

  __device__ __forceinline__ void init() {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&k_full[i], C::kFillingK), ptx::mbarrier_init(&k_empty[i], 4 * C::kGroups);
      ptx::mbarrier_init(&v_full[i], C::kFillingV), ptx::mbarrier_init(&v_empty[i], 4 * C::kGroups);
      ptx::mbarrier_init(&v_landed[i], 1);
    }
    jobs.init(4 * C::kGroups + C::kFillingV);
  }
};

// Tiles as the cache has them, between TMA and the warps that make of them what the wide lane takes.
template <class C, TileKind = C::kSizes.kind>
struct RawStorage {
  __device__ __forceinline__ void init() {}
};
template <class C>
struct RawStorage<C, TileKind::kConverted> {
  struct Side {
    alignas(128) unsigned char rows[C::kRawStages][C::kKeys * C::kRawRowBytes];
    alignas(16) __half2 scales[C::kRawStages][C::kHasScales ? C::kKeys : 4];
    uint64_t full[C::kRawStages], empty[C::kRawStages];
  };
  Side k, v;

  __device__ __forceinline__ void init() {
    for (int i = 0; i < C::kRawStages; ++i) {
      ptx::mbarrier_init(&k.full[i], 1), ptx::mbarrier_init(&k.empty[i], kConvertWarps);
      ptx::mbarrier_init(&v.full[i], 1), ptx::mbarrier_init(&v.empty[i], kConvertWarps);
    }
  }
};
template <class C>
struct RawStorage<C, TileKind::kFloat8> {
  alignas(1024) unsigned char v[C::kStages][C::kPanelsVo * C::kPanelBytes];
  uint64_t full[C::kStages], empty[C::kStages];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < C::kStages; ++i) ptx::mbarrier_init(&full[i], 1), ptx::mbarrier_init(&empty[i], kConvertWarps);
  }
};

// Eight neighbours of q, whatever its 16- or 32-bit dtype, as T.
template <class T>
__device__ __forceinline__ Vec<T> converted_q(const AttentionParams& p, int64_t begin, float sign, bool is_aligned) {
  Floats8 values;
  if (p.q_dtype == DType::kBFloat16) values = load_floats<__nv_bfloat16>(p.q, begin, is_aligned);
  else if (p.q_dtype == DType::kFloat16) values = load_floats<__half>(p.q, begin, is_aligned);
  else values = load_floats<float>(p.q, begin, is_aligned);
  Vec<T> packed;
#pragma unroll
  for (int k = 0; k < 8; ++k) packed.at[k] = from_float<T>(values.at[k] * sign);
  return packed;
}

// Maps of the cache's two sides: (byte of a row, token of the page, kv head, page), in boxes of one page, and of one panel where
// a tile comes as the tensor cores take it.
struct KvMaps {
  ptx::TensorMap k, v;
  ptx::TensorMap narrow_k, narrow_v;  // of a cache that is converted, for the narrow lane
};

}  // namespace tilestream::cuda
