// Int8 activations times group-quantised weights, for any M.
//
// The flat GEMM of FlashDecoding++ (Hong et al. 2023): the weight's columns are the rows of mma.m16n8k32 and
// the activations' rows its 8 columns, so that M is padded to 8 only. It serves M = 1 too: a warp unpacks 16
// bytes of weights in a dozen instructions and multiplies them by two mma, while dot products (dp4a) would
// take 8 instructions a row.
//
// Each warp streams its own spans of 128 k through its own ring of shared memory by cp.async, 16 bytes a
// lane: weights are read once, past L1. No block barrier until the end. Inner products of a group of 32 are
// exact in int32; then, in order,
//     acc = acc + float(int32) * weight_scale  (+ weight_zero * float(x_sum))
// and at a span's end total = total + acc * x_scale.
// Bound by reading the weights up to 32 rows; above, each 32 rows read them again (from L2).
//
// The order of k inside a group is free as long as both operands have it: lane (g, t) = (lane / 4, lane % 4)
// takes k 8t .. 8t + 7 of columns 4g .. 4g + 3, which are 16 bytes of 4-bit codes, or twice 16 of 8-bit ones.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/common/packed_format.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

constexpr int kSpanGroups = kScaleK / kGroupK;

// One row of a span; its size of 160 bytes puts 4 rows of a fragment into different banks.
struct alignas(32) SpanRow {
  int8_t q[kScaleK];
  int32_t sum[kSpanGroups];
  float scale;
};

template <PackedFormat F, int kTiles>  // kTiles: 8 rows each
struct SpanStage {
  uint4 weight[kSpanGroups * GroupLayout<F>::kBytes / 16];
  SpanRow rows[8 * kTiles];
};

// Stages of a warp's ring: 20 to 30 KB of weights under way in a block of 8 rows, and no block beyond the 99
// KB of sm_86.
template <PackedFormat F, int kTiles>
constexpr int kStages = kTiles > 1 ? 2 : GroupLayout<F>::kFourBit ? 4 : 3;

template <PackedFormat F, int kTiles>
union Int8Storage {
  SpanStage<F, kTiles> stages[kSlices][kStages<F, kTiles>];
  SliceSums<8 * kTiles> sums;
};

// Where 16 bytes of a group's codes stand in shared memory, so that the 8 lanes that one cycle serves meet
// all banks.
__device__ __forceinline__ int swizzled(int chunk) { return chunk ^ (chunk >> 2 & 6); }

// Starts the copies of one span; of rows past the last, zeros.
template <PackedFormat F, int kTiles>
__device__ __forceinline__ void fetch_span(const LinearParams& p, SpanStage<F, kTiles>& stage, int64_t span) {
  using Layout = GroupLayout<F>;
  constexpr int kGroupChunks = Layout::kBytes / 16, kCodeChunks = Layout::kScaleAt / 16, kRows = 8 * kTiles;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_groups = p.k / kGroupK, first_group = span * kSpanGroups;
  const int groups = int(min(int64_t(kSpanGroups), num_groups - first_group));
  const auto* panel = static_cast<const uint4*>(p.weight) + int64_t(blockIdx.x) * num_groups * kGroupChunks;
#pragma unroll
  for (int j = 0; j < int(ceil_div(kSpanGroups * kGroupChunks, kWarpSize)); ++j) {
    const int i = lane + j * kWarpSize, group = i / kGroupChunks, chunk = i % kGroupChunks;
    const int to = group * kGroupChunks + (chunk < kCodeChunks ? swizzled(chunk) : chunk);
    if (group < groups) ptx::cp_async<16>(&stage.weight[to], panel + first_group * kGroupChunks + i);
  }
  const int64_t first_row = int64_t(blockIdx.y) * kRows;
  constexpr int kRowChunks = kScaleK / 16;
#pragma unroll
  for (int j = 0; j < kRows * kRowChunks / kWarpSize; ++j) {
    const int i = lane + j * kWarpSize, r = i / kRowChunks, chunk = i % kRowChunks;
    const bool inside = first_row + r < p.m && chunk < 2 * groups;
    const int8_t* from = p.x_q.q + (first_row + r) * p.k + span * kScaleK + 16 * chunk;
    ptx::cp_async<16>(stage.rows[r].q + 16 * chunk, inside ? from : p.x_q.q, inside ? 16 : 0);
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int i = lane + j * kWarpSize, r = i / kSpanGroups, group = i % kSpanGroups;
    const bool inside = first_row + r < p.m && group < groups;
    const int32_t* from = p.x_q.sum + (first_row + r) * num_groups + first_group + group;
    ptx::cp_async<4>(stage.rows[r].sum + group, inside ? from : p.x_q.sum, inside ? 4 : 0);
  }
  if (lane < kRows) {
    const bool inside = first_row + lane < p.m;
    const float* from = p.x_q.scale + (first_row + lane) * ceil_div(p.k, kScaleK) + span;
    ptx::cp_async<4>(&stage.rows[lane].scale, inside ? from : p.x_q.scale, inside ? 4 : 0);
  }
}

// Codes of columns 4g .. 4g + 3: [column][0] has k 8t .. 8t + 3, [column][1] the next four.
template <PackedFormat F>
__device__ __forceinline__ void load_codes(const uint4* group, int g, int t, unsigned (&codes)[4][2]) {
  constexpr unsigned kLow = 0x0f0f0f0fu;
  if constexpr (GroupLayout<F>::kFourBit) {
    const uint4 v = group[swizzled(g / 4 * 16 + t * 4 + g % 4)];
    codes[0][0] = v.x & kLow, codes[0][1] = v.x >> 4 & kLow;
    codes[1][0] = v.y & kLow, codes[1][1] = v.y >> 4 & kLow;
    codes[2][0] = v.z & kLow, codes[2][1] = v.z >> 4 & kLow;
    codes[3][0] = v.w & kLow, codes[3][1] = v.w >> 4 & kLow;
  } else {
    const int chunk = g / 4 * 32 + t * 8 + g % 4;
    const uint4 low = group[swizzled(chunk)], high = group[swizzled(chunk + 4)];
    codes[0][0] = low.x, codes[0][1] = high.x;
    codes[1][0] = low.y, codes[1][1] = high.y;
    codes[2][0] = low.z, codes[2][1] = high.z;
    codes[3][0] = low.w, codes[3][1] = high.w;
  }
}

struct alignas(8) FourHalfs { __half at[4]; };

template <PackedFormat F, int kTiles>
__device__ __forceinline__ void multiply_span(const SpanStage<F, kTiles>& stage, int groups,
                                              Fragments<kTiles>& total) {
  using Layout = GroupLayout<F>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  constexpr int kStart = Layout::kHasZero ? 0 : -Layout::kOffset;  // what codes without a zero are off by
  Fragments<kTiles> acc = {};
#pragma unroll
  for (int j = 0; j < kSpanGroups; ++j) {
    if (j >= groups) break;
    const uint4* group = stage.weight + j * (Layout::kBytes / 16);
    unsigned codes[4][2];
    load_codes<F>(group, g, t, codes);
    const auto* scales = reinterpret_cast<const FourHalfs*>(group + Layout::kScaleAt / 16);  // then the zeros
    const FourHalfs scale = scales[g], zero = Layout::kHasZero ? scales[kPanelColumns / 4 + g] : FourHalfs{};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint2 x = *reinterpret_cast<const uint2*>(stage.rows[8 * tile + g].q + kGroupK * j + 8 * t);
      const int sum[2] = {stage.rows[8 * tile + 2 * t].sum[j], stage.rows[8 * tile + 2 * t + 1].sum[j]};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto& one = codes[2 * h];
        const auto& two = codes[2 * h + 1];
        int dot[4] = {kStart * sum[0], kStart * sum[1], kStart * sum[0], kStart * sum[1]};
        ptx::mma_m16n8k32_u8s8(dot, {one[0], two[0], one[1], two[1]}, {x.x, x.y});
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = 2 * h + i / 2;
          float& to = acc[tile][h][i];
          to = fmaf(float(dot[i]), to_float(scale.at[c]), to);
          if constexpr (Layout::kHasZero) to = fmaf(to_float(zero.at[c]), float(sum[i % 2]), to);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = stage.rows[8 * tile + 2 * t + i % 2].scale;
#pragma unroll
      for (int h = 0; h < 2; ++h) total[tile][h][i] = fmaf(acc[tile][h][i], scale, total[tile][h][i]);
    }
  }
}

template <PackedFormat F, int kTiles>
__global__ void __launch_bounds__(kBlockThreads) int8_kernel(const __grid_constant__ LinearParams p) {
  constexpr int kDepth = kStages<F, kTiles>;
  auto& smem = dynamic_smem<Int8Storage<F, kTiles>>();
  const int warp = threadIdx.x / kWarpSize;
  auto& ring = smem.stages[warp];
  const int64_t num_spans = ceil_div(p.k, kScaleK);
  Fragments<kTiles> total = {};
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) {
    if (warp + i * kSlices < num_spans) fetch_span<F, kTiles>(p, ring[i], warp + i * kSlices);
    ptx::cp_async_commit_group();
  }
  int at = 0;
  for (int64_t span = warp; span < num_spans; span += kSlices) {
    const int64_t next = span + (kDepth - 1) * kSlices;
    if (next < num_spans) fetch_span<F, kTiles>(p, ring[(at + kDepth - 1) % kDepth], next);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<kDepth - 1>();
    __syncwarp();
    const int groups = int(min(int64_t(kSpanGroups), p.k / kGroupK - span * kSpanGroups));
    multiply_span<F, kTiles>(ring[at], groups, total);
    __syncwarp();  // before the stage is overwritten
    at = (at + 1) % kDepth;
  }
  ptx::cp_async_wait_all();
  __syncthreads();  // the sums take the rings' place
  put_fragments<kTiles>(smem.sums[warp], total);
  store_tile<8 * kTiles>(p, smem.sums);
}

// Instantiations: 4 formats x tiles of 8, 16 and 32 rows.
template <PackedFormat F>
void launch_int8(const LinearParams& p, Stream stream) {
  const auto launch_tiles = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    launch(int8_kernel<F, kTiles>, tile_config<8 * kTiles>(p, sizeof(Int8Storage<F, kTiles>), stream), p);
  };
  if (p.m <= 8) launch_tiles(Constant<1>{});
  else if (p.m <= 16) launch_tiles(Constant<2>{});
  else launch_tiles(Constant<4>{});
}

}  // namespace tilestream::cuda
