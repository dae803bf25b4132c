// What the kernels of linear.cu share: how a block divides K, and how its warps' sums become outputs.
//
// A block makes kRows rows of one panel's 32 columns. Its 4 warps divide K: warp w takes the spans of 128 k w, w + 4, ...,
// and the warps' sums are added in one order. So a row's bits do not depend on M or on the tile that it falls into.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {

constexpr int kSlices = 4;  // warps of a block, each with its share of K
constexpr int kBlockThreads = kSlices * kWarpSize;

template <int kRows>
using SliceSums = float[kSlices][kRows][kPanelColumns];

// Adds up what every warp has put into `sums`, and the bias. The whole block takes part.
template <int kRows>
__device__ __forceinline__ void store_tile(const LinearParams& p, const SliceSums<kRows>& sums) {
  __syncthreads();
  const int column = threadIdx.x % kPanelColumns;
  const int64_t n = int64_t(blockIdx.x) * kPanelColumns + column, first_row = int64_t(blockIdx.y) * kRows;
  if (n >= p.n) return;
  const float bias = p.bias != nullptr ? static_cast<const float*>(p.bias)[n] : 0.0f;
  for (int r = threadIdx.x / kPanelColumns; r < kRows && first_row + r < p.m; r += kBlockThreads / kPanelColumns) {
    const float sum = (sums[0][r][column] + sums[1][r][column]) + (sums[2][r][column] + sums[3][r][column]);
    store_as(p.dtype, p.y, (first_row + r) * p.y_row_stride + n, sum + bias);
  }
}

template <int kRows>
inline dim3 tile_grid(const LinearParams& p) {
  return {unsigned(ceil_div(p.n, kPanelColumns)), unsigned(ceil_div(p.m, kRows)), 1};
}

}  // namespace tilestream::cuda
