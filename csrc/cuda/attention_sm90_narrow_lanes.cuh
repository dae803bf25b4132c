// The Hopper attention's narrow lane: which lane has what.
#pragma once

#include "cuda/attention_sm90_config.cuh"
#include "cuda/common/kv_values.cuh"

namespace tilestream::cuda {

// Of kNum lanes, four apart: the one at place i gets v[i] of each, in their order.
template <int kNum>
__device__ __forceinline__ void transpose_lanes(float (&v)[kNum]) {
  const int place = ptx::opaque(threadIdx.x) / 4 % kNum;
#pragma unroll
  for (int distance = 1; distance < kNum; distance *= 2) {
    const bool upper = place & distance;
#pragma unroll
    for (int a = 0; a < kNum; ++a) {
      if (a & distance) continue;
      float& low = v[a];
      float& high = v[a | distance];
      const float got = __shfl_xor_sync(kFullMask, upper ? low : high, distance * 4);
      (upper ? low : high) = got;
    }
  }
}

// Where column d of q stands for products with keys that come as fragments a: lane t of four has a quarter of a key's columns,
// one after the other, and of these four in each step, at its places 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. d even.
template <class C>
__device__ __forceinline__ int fragment_column(int d) {
  constexpr int kOwn = C::kDimQk / 4;
  return d % kOwn / 4 * 16 + d / kOwn * 2 + d / 2 % 2 * 8;
}

// The values of the lowest bits of a word.
template <class KV, int kNum>
__device__ __forceinline__ void kv_floats(unsigned word, float2 scale, float (&values)[kNum]) {
  if constexpr (kIsQuantised<KV>) {
    const float zero = fmaf(-kByteBias<KV>, scale.x, scale.y);
    const unsigned bytes[2] = {kKvBits<KV> == 8 ? word : word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu};
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const int odd = kKvBits<KV> == 8 ? 0 : i % 2, byte = kKvBits<KV> == 8 ? i : i / 2;
      values[i] = fmaf(biased<KV>(bytes[odd], byte), scale.x, zero);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNum; i += 2) {
      const float2 pair = __half22float2(half2_of_e4m3((unsigned short)(word >> 8 * i)));
      values[i] = pair.x, values[i + 1] = pair.y;
    }
  }
}

}  // namespace tilestream::cuda
