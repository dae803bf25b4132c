// The Hopper linears' sizes, their shared memory, and the steps that a block's warps go through together.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace tilestream::cuda {

constexpr int kLoadWarp = 0, kScaleWarp = 1, kFirstWidenWarp = 2, kWidenWarps = 2;  // of the first warpgroup
constexpr unsigned kRowBytes8 = kScaleK, kRowBytes4 = kScaleK / 2;                  // of one group of a row

// A block makes kTokens rows of kColumns columns: each of kWarpgroups warpgroups kHalves times 64 columns,
// kHalves times 16 a warp.
template <PackedFormat F, int kTokens_, int kWarpgroups_, int kHalves_>
struct LinearSm90 {
  static constexpr PackedFormat kFormat = F;
  using Layout = GroupLayout<F>;
  static constexpr int kTokens = kTokens_, kWarpgroups = kWarpgroups_, kHalves = kHalves_;
  static constexpr bool kWide = kWarpgroups > 1;  // else blocks of a cluster have a slice of K each
  static constexpr int kColumns = kWarpgroups * kHalves * 64, kPanels = kColumns / kPanelColumns;
  static constexpr int kThreads = (1 + kWarpgroups) * 128, kBlocksPerSm = kTokens * kHalves > 64 ? 1 : 2;
  static constexpr int kChunk = kWide ? 64 : kTokens, kChunks = kTokens / kChunk;  // tokens of one wgmma
  static constexpr bool kTwoGroups = kHalves == 1 && kTokens <= (Layout::kHasZero ? 16 : 32);  // under way at once
  // Of wide blocks. Sums make loading take more.
  static constexpr int kLoadRegisters = Layout::kHasZero ? 40 : 24, kMultiplyRegisters = Layout::kHasZero ? 232 : 240;

  static constexpr int kSums = Layout::kHasZero ? Layout::kParts : 0;
  static constexpr int kStageBytes = kTokens * int(kRowBytes8 + kRowBytes4 + 4 + 4 * kSums) + kPanels * Layout::kBytes + 24;
  static constexpr int kFit = (kBlocksPerSm == 1 ? 226 : 112) * 1024 / kStageBytes, kStages = kFit < 16 ? kFit : 16;
};

template <class C>
struct LinearSm90Storage {
  static constexpr int kStages = C::kStages;
  alignas(1024) unsigned char x[kStages][C::kTokens * kRowBytes8];  // int8, swizzled
  alignas(128) unsigned char x4[kStages][C::kTokens * kRowBytes4];  // nibbles, before they are widened into x
  alignas(16) unsigned char weight[kStages][C::kPanels][C::Layout::kBytes];
  alignas(16) float scale[kStages][C::kTokens];
  alignas(16) int32_t sum[kStages][C::kTokens][C::kSums > 0 ? C::kSums : 1];
  // full: the weights, x, and the scale warp's lanes; landed: x4.
  uint64_t full[kStages], empty[kStages], landed[kStages];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], 2 + kWarpSize), ptx::mbarrier_init(&empty[i], 4 * C::kWarpgroups);
      ptx::mbarrier_init(&landed[i], 1);
    }
  }
};

struct LinearMaps {
  ptx::TensorMap x, x4;  // the rows' INT8 and INT4 elements: (byte, row)
};

// Where a block of a cluster leaves its slice's sum for column n of a row: [slices][m][n to a multiple of 32].
__device__ __forceinline__ float* slice_sum(const LinearParams& p, int slice, int64_t row, int64_t n) {
  return static_cast<float*>(p.workspace) + (slice * p.m + row) * round_up(p.n, kPanelColumns) + n;
}

// Which stage is next, and the parity of its `full`; of its `empty` for the one who fills it, the other.
template <int kStages>
struct StageRing {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// How the work is cut; counted on the host. A block's share: tiles, those of the same columns one after the other, and of
// each all groups of k, or where the blocks of a cluster share a tile, one slice of them.
template <class C>
struct LinearWork {
  int num_groups, num_groups4, num_slices, row_tiles, num_tiles;

  explicit LinearWork(const LinearParams& p)
      : num_groups(int(ceil_div(p.k, kScaleK))),
        num_groups4(int(p.x_q.k4 / kScaleK)),
        num_slices(sm90_slices(p.n, p.k)),
        row_tiles(int(ceil_div(p.m, C::kTokens))),
        num_tiles(row_tiles * int(ceil_div(p.n, C::kColumns))) {}

  TILESTREAM_HOST_DEVICE int blocks_per_tile() const { return C::kWide ? 1 : num_slices; }
  __device__ __forceinline__ int first_tile() const { return int(blockIdx.x) / blocks_per_tile(); }
  __device__ __forceinline__ int tile_step() const { return int(gridDim.x) / blocks_per_tile(); }
  __device__ __forceinline__ int first_row(int tile) const { return tile % row_tiles * C::kTokens; }
  __device__ __forceinline__ int first_column(int tile) const { return tile / row_tiles * C::kColumns; }
  __device__ __forceinline__ int slice_begin(int slice) const { return num_groups * slice / num_slices; }
  __device__ __forceinline__ int first_slice() const { return C::kWide ? 0 : int(blockIdx.x) % num_slices; }
  __device__ __forceinline__ int end_slice() const { return C::kWide ? num_slices : first_slice() + 1; }

  // Calls run(tile, group, ring position) for all of it.
  template <class Run>
  __device__ __forceinline__ void for_each_step(Run run) const {
    StageRing<C::kStages> ring;
    for (int tile = first_tile(); tile < num_tiles; tile += tile_step()) {
      for (int group = slice_begin(first_slice()); group < slice_begin(end_slice()); ++group, ring.advance())
        run(tile, group, ring);
    }
  }
};

}  // namespace tilestream::cuda
