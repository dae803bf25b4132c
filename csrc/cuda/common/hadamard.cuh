// The orthogonal Hadamard matrix of kScaleK, on values in registers.
#pragma once

#include "cuda/common/reduce.cuh"
#include "tilestream/quantise.h"

namespace tilestream::cuda {

// Multiplies each kScaleK values by it. Every lane of the warp takes part; lanes hold kSize consecutive elements, the first
// lane's at a multiple of kScaleK.
template <int kSize>
__device__ __forceinline__ void hadamard_span(float (&values)[kSize]) {
#pragma unroll
  for (int distance = 1; distance < kSize; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i & distance) continue;
      const float first = values[i], second = values[i + distance];
      values[i] = first + second, values[i + distance] = first - second;
    }
  }
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kScaleK / kSize; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float other = __shfl_xor_sync(kFullMask, values[i], distance);
      values[i] = lane & distance ? other - values[i] : values[i] + other;
    }
  }
  static_assert(kScaleK == 128);
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] *= 0.088388347648318447f;  // 1 / sqrt(kScaleK)
}

}  // namespace tilestream::cuda
