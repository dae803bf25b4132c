// How blocks deal out the spans of linear_int8.cuh. Weights are read from HBM once for M up to 128 (64 for
// kU8G32).
//
// M up to 8: int8_flat_kernel. A block has one panel; its 8 warps take a slice of K each, and each streams
// its spans through its own ring of shared memory by cp.async. No block barrier until the end. Bound by
// reading the weights. At N = 4,096 there are 128 blocks, one for each of the 132 SMs of an H200, whose 4.8
// TB/s and latency of about 1 us under load (an estimate) ask for 36 KB under way in each: a ring keeps 2
// stages of 4-bit codes, or 1 of 8-bit, under way beside the one in use, 8 x 2 x 2.3 = 37 KB or 35 KB. One
// block gives 2 warps to each scheduler, which has 440 cycles for the 250 instructions of a span.
//
// Above: int8_tile_kernel. A block has 4 panels and a tile of 16 to 128 rows; its warps share each span's
// weights and rows in one ring, so that rows are read from L2 once for 128 columns: with one panel a block,
// M = 64 would read 3.6 times as many bytes of rows as of 4-bit weights. Tiles that would leave half of the GPU
// without work, a few or those of the last wave, are divided: each slice gets a block of its own, and
// sum_slices_kernel adds what they leave. Budgets: docs/kernels/linear_w4ax.md.
#pragma once

#include "cuda/common/linear_int8.cuh"

namespace tilestream::cuda {

constexpr int64_t kSmemBytes = 99 * 1024;  // what a block may have on sm_86 and sm_89

// As many stages as fit, and no more than latency asks for.
template <class Stage>
constexpr int stages_that_fit(int num_rings) {
  const int64_t fit = kSmemBytes / (num_rings * int64_t(sizeof(Stage)));
  return fit < 4 ? int(fit) : 4;
}

template <PackedFormat F>
struct FlatStorage {
  using Stage = SpanStage<F, 1, 8>;
  static constexpr int kStages = stages_that_fit<Stage>(kSlices);
  static_assert(kStages >= 2, "a span is multiplied while the next is under way");
  union {
    Stage rings[kSlices][kStages];
    SliceSums<8> sums;
  };
};

template <PackedFormat F>
__global__ void __launch_bounds__(kBlockThreads, 2) int8_flat_kernel(const __grid_constant__ LinearParams p) {
  using Storage = FlatStorage<F>;
  constexpr int kStages = Storage::kStages;
  auto& smem = dynamic_smem<Storage>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  auto& ring = smem.rings[warp];
  const int num_spans = int(ceil_div(p.k, kScaleK));
  const int begin = first_span(num_spans, warp), end = first_span(num_spans, warp + 1);
  const auto fetch = [&](int stage, int span) {
    if (span < end) fetch_span<kWarpSize>(p, ring[stage], blockIdx.x, 0, span, lane);
    ptx::cp_async_commit_group();
  };
  Fragments<1> total = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i, begin + i);
  int at = 0;
  for (int span = begin; span < end; ++span) {
    fetch((at + kStages - 1) % kStages, span + kStages - 1);
    ptx::cp_async_wait_group<kStages - 1>();
    __syncwarp();
    const auto& stage = ring[at];
    multiply_span<F, 1>(is_int4<F>(p, span), stage.weight[0], stage.rows, stage.scale, total);
    __syncwarp();  // before the stage is overwritten
    at = (at + 1) % kStages;
  }
  ptx::cp_async_wait_all();
  __syncthreads();  // the sums take the rings' place
  put_fragments<1>(smem.sums[warp], total);
  store_tile<8>(p, smem.sums);
}

constexpr int kTilePanels = kTileColumns / kPanelColumns;

// Tiles from `first` on, of a grid of columns of tiles_m tiles of `rows` rows.
TILESTREAM_HOST_DEVICE constexpr SharedTiles shared_tiles(unsigned first, unsigned tiles_m, int rows) {
  return {int64_t(first / tiles_m) * kTileColumns, int64_t(first % tiles_m) * rows};
}

// A warp makes 8 kTiles rows of one panel; kRowGroups such rows of warps.
template <PackedFormat F, int kTiles, int kRowGroups>
struct TileStorage {
  static constexpr int kRows = 8 * kTiles * kRowGroups, kThreads = kTilePanels * kRowGroups * kWarpSize;
  using Stage = SpanStage<F, kTilePanels, kRows>;
  static constexpr int kStages = stages_that_fit<Stage>(1);
  static_assert(kStages >= 2, "a span is multiplied while the next is under way");
  Stage ring[kStages];
};

// Blocks: one for each of the first `whole` tiles, then one for each slice of the others, those with INT8 spans
// first, for they take the longest. Rows first: blocks that run at the same time then share weights in L2.
template <PackedFormat F, int kTiles, int kRowGroups>
__global__ void __launch_bounds__(TileStorage<F, kTiles, kRowGroups>::kThreads, 1)
    int8_tile_kernel(const __grid_constant__ LinearParams p, unsigned whole) {
  using Storage = TileStorage<F, kTiles, kRowGroups>;
  constexpr int kStages = Storage::kStages;
  auto& ring = dynamic_smem<Storage>().ring;
  const int warp = threadIdx.x / kWarpSize, row_in_tile = warp / kTilePanels * 8 * kTiles;
  const unsigned tiles_m = unsigned(ceil_div(p.m, Storage::kRows));
  unsigned tile = blockIdx.x;
  int own_slice = kAllSlices;
  if (tile >= whole) {
    const unsigned shared = (gridDim.x - whole) / kSlices, piece = tile - whole;
    tile = whole + piece % shared;
    own_slice = kSlices - 1 - int(piece / shared);
  }
  const int64_t first_row = int64_t(tile % tiles_m) * Storage::kRows;
  const int first_panel = tile / tiles_m * kTilePanels;
  const int num_spans = int(ceil_div(p.k, kScaleK));
  int slice = own_slice == kAllSlices ? 0 : own_slice;
  const int end_slice = own_slice == kAllSlices ? kSlices : slice + 1;
  const int begin = first_span(num_spans, slice), end = first_span(num_spans, end_slice);
  const auto fetch = [&](int stage, int span) {
    if (span < end) fetch_span<Storage::kThreads>(p, ring[stage], first_panel, first_row, span, threadIdx.x);
    ptx::cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i, begin + i);
  Fragments<kTiles> sum = {}, total = {};
  int at = 0;
  for (int span = begin; span < end; ++span) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the span is here, and everybody has left the stage that is filled next
    fetch((at + kStages - 1) % kStages, span + kStages - 1);
    const auto& stage = ring[at];
    multiply_span<F, kTiles>(is_int4<F>(p, span), stage.weight[warp % kTilePanels], stage.rows + row_in_tile,
                             stage.scale + row_in_tile, total);
    at = (at + 1) % kStages;
    for (; slice < end_slice && span + 1 >= first_span(num_spans, slice + 1); ++slice) {
      add_fragments<kTiles>(sum, total);
      clear_fragments<kTiles>(total);
    }
  }
  ptx::cp_async_wait_all();
  const int64_t panel = first_panel + warp % kTilePanels;
  if (panel * kPanelColumns >= p.n) return;
  const SharedTiles shared = shared_tiles(whole, tiles_m, Storage::kRows);
  store_fragments<kTiles>(p, first_row + row_in_tile, panel, sum, shared, own_slice);
}

template <PackedFormat F, int kTiles, int kRowGroups>
void launch_int8_tiles(const LinearParams& p, Stream stream) {
  using Storage = TileStorage<F, kTiles, kRowGroups>;
  constexpr auto kKernel = int8_tile_kernel<F, kTiles, kRowGroups>;
  const unsigned tiles_m = unsigned(ceil_div(p.m, Storage::kRows));
  const unsigned tiles = tiles_m * unsigned(ceil_div(p.n, kTileColumns));
  const unsigned wave = resident_blocks(kKernel, Storage::kThreads, sizeof(Storage)), last = tiles % wave;
  const unsigned shared = last <= std::min<unsigned>(wave / 2, kMostSharedTiles) ? last : 0, whole = tiles - shared;
  launch(kKernel, {.grid = whole + kSlices * shared, .block = Storage::kThreads, .smem_bytes = sizeof(Storage),
                   .stream = stream}, p, whole);
  if (shared > 0) launch_sum(p, shared_tiles(whole, tiles_m, Storage::kRows), kSlices, stream);
}

// Instantiations: 7 formats x tiles of 8, 16, 32, 64 and, for all but kU8G32, 128 rows.
template <PackedFormat F>
void launch_int8(const LinearParams& p, Stream stream) {
  constexpr int kMostTiles = F == PackedFormat::kU8G32 ? 4 : 8;  // whose weights leave no registers for 8
  if (p.m <= 8) {
    const LaunchConfig config{.grid = unsigned(ceil_div(p.n, kPanelColumns)), .block = kBlockThreads,
                              .smem_bytes = sizeof(FlatStorage<F>), .stream = stream};
    launch(int8_flat_kernel<F>, config, p);
  } else if (p.m <= 16) {
    launch_int8_tiles<F, 2, 1>(p, stream);
  } else if (p.m <= 32) {
    launch_int8_tiles<F, 4, 1>(p, stream);
  } else if (p.m <= 64) {
    launch_int8_tiles<F, 4, 2>(p, stream);
  } else {
    launch_int8_tiles<F, kMostTiles, 2>(p, stream);
  }
}

}  // namespace tilestream::cuda
