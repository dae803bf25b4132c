// Sums over a warp and over a block, in an order that depends on nothing but the thread count.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Every lane gets the sum, the same bits in each.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullMask, v, distance);
  return v;
}

// Every thread of a one-dimensional block gets the sum. `partials` holds one float per warp.
__device__ __forceinline__ float block_sum(float v, float* partials) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, num_warps = blockDim.x / kWarpSize;
  v = warp_sum(v);
  if (lane == 0) partials[warp] = v;
  __syncthreads();
  return warp_sum(lane < num_warps ? partials[lane] : 0.0f);
}

}  // namespace tilestream::cuda
