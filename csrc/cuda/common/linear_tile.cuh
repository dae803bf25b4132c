// What the kernels of linear.cu share: how a block divides K, and how its warps' sums become outputs.
//
// A block makes kRows rows of one panel's 32 columns. Its 4 warps divide K: warp w takes the spans of 128 k
// w, w + 4, ..., and the warps' sums are added in one order. So a row's bits do not depend on M or on the
// tile that it falls into.
#pragma once

#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {

constexpr int kSlices = 4;  // warps of a block, each with its share of K
constexpr int kBlockThreads = kSlices * kWarpSize;

template <int kRows>
using SliceSums = float[kSlices][kRows][kPanelColumns];

// What a lane (g, t) = (lane / 4, lane % 4) has of a tile whose weight columns are the rows of two mma, 8
// rows of x to a tile: [tile][h][i] is column 4g + 2h + i / 2 of row 8 tile + 2t + i % 2.
template <int kTiles>
using Fragments = float[kTiles][2][4];

template <int kTiles>
__device__ __forceinline__ void put_fragments(float (&sums)[8 * kTiles][kPanelColumns],
                                              const Fragments<kTiles>& from) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto& v = from[tile];
      auto* const to = reinterpret_cast<float4*>(&sums[8 * tile + 2 * t + r][4 * g]);
      *to = make_float4(v[0][r], v[0][2 + r], v[1][r], v[1][2 + r]);
    }
  }
}

// Adds up what every warp has put into `sums`, and the bias. The whole block takes part.
template <int kRows>
__device__ __forceinline__ void store_tile(const LinearParams& p, const SliceSums<kRows>& sums) {
  __syncthreads();
  const int column = threadIdx.x % kPanelColumns;
  const int64_t n = int64_t(blockIdx.x) * kPanelColumns + column, first_row = int64_t(blockIdx.y) * kRows;
  if (n >= p.n) return;
  const float bias = p.bias != nullptr ? static_cast<const float*>(p.bias)[n] : 0.0f;
  const int num_rows = int(min(int64_t(kRows), p.m - first_row));
  for (int r = threadIdx.x / kPanelColumns; r < num_rows; r += kBlockThreads / kPanelColumns) {
    const float sum = (sums[0][r][column] + sums[1][r][column]) + (sums[2][r][column] + sums[3][r][column]);
    store_as(p.dtype, p.y, (first_row + r) * p.y_row_stride + n, sum + bias);
  }
}

template <int kRows>
LaunchConfig tile_config(const LinearParams& p, size_t smem_bytes, Stream stream) {
  const dim3 grid(unsigned(ceil_div(p.n, kPanelColumns)), unsigned(ceil_div(p.m, kRows)));
  return {.grid = grid, .block = kBlockThreads, .smem_bytes = smem_bytes, .stream = stream};
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

}  // namespace tilestream::cuda
