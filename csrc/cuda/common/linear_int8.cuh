// Int8 activations times group-quantised weights, for any M: one warp, one span of 128 k, one panel.
// linear_int8_kernels.cuh deals these out.
//
// The weight's columns are the rows of mma.m16n8k32 and the activations' rows its 8 columns (the flat GEMM of
// FlashDecoding++, Hong et al. 2023), so that M is padded to 8 only. It serves M = 1 too: a warp unpacks 16
// bytes of weights in a dozen instructions and multiplies them by two mma, while dot products (dp4a) would
// take 8 instructions a row.
//
// Inner products of a group of 32 are exact in int32; then, in order,
//     acc = acc + float(int32) * weight_scale  (+ weight_zero * float(x_sum))
// and at a span's end total = total + acc * x_scale.
//
// The order of k inside a group is free as long as both operands have it: lane (g, t) = (lane / 4, lane % 4)
// takes k 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3 of columns 4g .. 4g + 3, which are 16 bytes of 4-bit codes, or twice
// 16 of 8-bit ones.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/common/packed_format.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

constexpr int kSpanGroups = kScaleK / kGroupK;

template <PackedFormat F>
constexpr int kSpanChunks = kSpanGroups * GroupLayout<F>::kBytes / 16;  // of 16 bytes, of one panel

// One row of a span; its size of 160 bytes puts 4 rows of a fragment into different banks.
struct alignas(32) SpanRow {
  int8_t q[kScaleK];
  int32_t sum[kSpanGroups];
  float scale;
};

template <PackedFormat F, int kPanels, int kRows>
struct SpanStage {
  uint4 weight[kPanels][kSpanChunks<F>];
  SpanRow rows[kRows];
};

// Where 16 bytes of a group's codes stand in shared memory, so that the 8 lanes that one cycle serves meet
// all banks.
__device__ __forceinline__ int swizzled(int chunk) { return chunk ^ (chunk >> 2 & 6); }

// Starts the copies of one span, by kThreads threads. Groups past k and rows past m are zeros; panels past
// the last are the last again, and their sums not stored.
template <int kThreads, PackedFormat F, int kPanels, int kRows>
__device__ __forceinline__ void fetch_span(const LinearParams& p, SpanStage<F, kPanels, kRows>& stage,
                                           int first_panel, int64_t first_row, int span, int thread) {
  using Layout = GroupLayout<F>;
  constexpr int kGroupChunks = Layout::kBytes / 16, kCodeChunks = Layout::kScaleAt / 16;
  const int num_groups = int(p.k / kGroupK), first_group = span * kSpanGroups;
  const int last_panel = int(ceil_div(p.n, kPanelColumns)) - 1;
  const int groups = min(kSpanGroups, num_groups - first_group);
  // Not the larger kernels' loops: they need the registers.
  [[maybe_unused]] constexpr int kUnroll = kPanels == 1 ? 8 : 1;
  const auto* const weight = static_cast<const uint4*>(p.weight);
#pragma unroll kUnroll
  for (int j = 0; j < int(ceil_div(kPanels * kSpanChunks<F>, kThreads)); ++j) {
    const int i = thread + j * kThreads, panel = i / kSpanChunks<F>, in_span = i % kSpanChunks<F>;
    if (kPanels * kSpanChunks<F> % kThreads != 0 && panel >= kPanels) break;
    const int group = in_span / kGroupChunks, chunk = in_span % kGroupChunks;
    const int to = group * kGroupChunks + (chunk < kCodeChunks ? swizzled(chunk) : chunk);
    const int64_t first = int64_t(min(first_panel + panel, last_panel)) * num_groups + first_group;
    const auto* const from = weight + first * kGroupChunks + in_span;
    const bool inside = group < groups;
    ptx::cp_async<16>(&stage.weight[panel][to], inside ? from : weight, inside ? 16 : 0);
  }
  constexpr int kRowChunks = kScaleK / 16;
#pragma unroll kUnroll
  for (int j = 0; j < int(ceil_div(kRows * kRowChunks, kThreads)); ++j) {
    const int i = thread + j * kThreads, r = i / kRowChunks, chunk = i % kRowChunks;
    if (kRows * kRowChunks % kThreads != 0 && r >= kRows) break;
    const bool inside = first_row + r < p.m && chunk < 2 * groups;
    const int8_t* from = p.x_q.q + (first_row + r) * p.k + span * kScaleK + 16 * chunk;
    ptx::cp_async<16>(stage.rows[r].q + 16 * chunk, inside ? from : p.x_q.q, inside ? 16 : 0);
  }
#pragma unroll kUnroll
  for (int j = 0; j < int(ceil_div(kRows * kSpanGroups, kThreads)); ++j) {
    const int i = thread + j * kThreads, r = i / kSpanGroups, group = i % kSpanGroups;
    if (kRows * kSpanGroups % kThreads != 0 && r >= kRows) break;
    const bool inside = first_row + r < p.m && group < groups;
    const int32_t* from = p.x_q.sum + (first_row + r) * num_groups + first_group + group;
    ptx::cp_async<4>(stage.rows[r].sum + group, inside ? from : p.x_q.sum, inside ? 4 : 0);
  }
  static_assert(kRows <= kThreads, "a thread fetches one row's scale at most");
  if (thread < kRows) {
    const bool inside = first_row + thread < p.m;
    const float* from = p.x_q.scale + (first_row + thread) * ceil_div(p.k, kScaleK) + span;
    ptx::cp_async<4>(&stage.rows[thread].scale, inside ? from : p.x_q.scale, inside ? 4 : 0);
  }
}

// Codes of columns 4g .. 4g + 3 of a group: [column][0] has k 4t .. 4t + 3, [column][1] has k 16 + 4t .. 16 + 4t + 3.
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
    const int chunk = g / 4 * 32 + t * 4 + g % 4;
    const uint4 low = group[swizzled(chunk)], high = group[swizzled(chunk + 16)];
    codes[0][0] = low.x, codes[0][1] = high.x;
    codes[1][0] = low.y, codes[1][1] = high.y;
    codes[2][0] = low.z, codes[2][1] = high.z;
    codes[3][0] = low.w, codes[3][1] = high.w;
  }
}

struct alignas(8) FourHalfs { __half at[4]; };

// What a lane needs of one panel's span, unpacked once for all rows.
template <PackedFormat F>
struct SpanWeight {
  static constexpr bool kHasZero = GroupLayout<F>::kHasZero;
  unsigned codes[kSpanGroups][4][2];
  float scale[kSpanGroups][4];
  float zero[kHasZero ? kSpanGroups : 1][4];
};

template <PackedFormat F>
__device__ __forceinline__ void load_weight(const uint4* panel, SpanWeight<F>& w) {
  using Layout = GroupLayout<F>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kSpanGroups; ++j) {
    const uint4* group = panel + j * (Layout::kBytes / 16);
    load_codes<F>(group, g, t, w.codes[j]);
    const auto* scales = reinterpret_cast<const FourHalfs*>(group + Layout::kScaleAt / 16);  // then the zeros
    const FourHalfs scale = scales[g];
#pragma unroll
    for (int c = 0; c < 4; ++c) w.scale[j][c] = to_float(scale.at[c]);
    if constexpr (Layout::kHasZero) {
      const FourHalfs zero = scales[kPanelColumns / 4 + g];
#pragma unroll
      for (int c = 0; c < 4; ++c) w.zero[j][c] = to_float(zero.at[c]);
    }
  }
}

// Integers are summed on top of the bits of 1.5 * 2^23, where they are the low bits of a float: |sum| stays
// below 2^22 (32 products of at most 255 * 127), so a subtraction converts it, four times as fast as I2F.
constexpr int kMagicBits = 0x4b400000;
__device__ __forceinline__ float magic_to_float(int bits) { return __int_as_float(bits) - 12582912.0f; }

// total += one span of 8 kTiles rows, the first at `rows`, times the weight.
template <PackedFormat F, int kTiles>
__device__ __forceinline__ void multiply_span(const SpanWeight<F>& w, const SpanRow* rows,
                                              Fragments<kTiles>& total) {
  using Layout = GroupLayout<F>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  constexpr int kStart = Layout::kHasZero ? 0 : -Layout::kOffset;  // what codes without a zero are off by
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const SpanRow& mine = rows[8 * tile + g];
    const SpanRow* const sums = rows + 8 * tile + 2 * t;  // of the two rows whose outputs the lane holds
    float acc[2][4] = {};
#pragma unroll
    for (int j = 0; j < kSpanGroups; ++j) {
      const auto* const x = reinterpret_cast<const unsigned*>(mine.q + kGroupK * j + 4 * t);
      const int sum[2] = {sums[0].sum[j], sums[1].sum[j]};
      const int start[2] = {kMagicBits + kStart * sum[0], kMagicBits + kStart * sum[1]};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto& one = w.codes[j][2 * h];
        const auto& two = w.codes[j][2 * h + 1];
        int dot[4] = {start[0], start[1], start[0], start[1]};
        ptx::mma_m16n8k32_u8s8(dot, {one[0], two[0], one[1], two[1]}, {x[0], x[4]});
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = 2 * h + i / 2;
          acc[h][i] = fmaf(magic_to_float(dot[i]), w.scale[j][c], acc[h][i]);
          if constexpr (Layout::kHasZero) acc[h][i] = fmaf(w.zero[j][c], float(sum[i % 2]), acc[h][i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) total[tile][h][i] = fmaf(acc[h][i], sums[i % 2].scale, total[tile][h][i]);
    }
  }
}

}  // namespace tilestream::cuda
