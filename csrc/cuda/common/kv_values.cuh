// Values of 8 and 4 bits as a cache stores them, made into what the tensor cores take.
#pragma once

#include "cuda/common/kv_cache.cuh"
#include "cuda/ptx/math.cuh"

namespace tilestream::cuda {

template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) return ptx::cvt_f16x2(low, high);
  else return ptx::cvt_bf16x2(low, high);
}

// Eight values of e4m3 as T, which holds each of them.
template <class T>
__device__ __forceinline__ Vec<T> e4m3_values(const unsigned* words) {
  Vec<T> packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned halves = e4m3x2_to_f16x2((unsigned short)(words[i / 2] >> i % 2 * 16));
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(halves));
    reinterpret_cast<unsigned*>(&packed)[i] = std::is_same_v<T, __half> ? halves : pack<T>(pair.x, pair.y);
  }
  return packed;
}

// Integers to floats: a byte counts 1 in the mantissa of 32768.0f when it is its second, and of 128.0f when it is its third,
// where it has 7 bits. One prmt puts it there, and the fma that scales it takes the bias away again: within 2^-9 of a scale of 8
// bits, within 2^-17 of one of 4, which is 17 times as large.
template <class KV>
constexpr float kByteBias = kKvBits<KV> == 8 ? 32768.0f : 128.0f;
template <class KV>
__device__ __forceinline__ float biased(unsigned bytes, int byte) {
  constexpr unsigned kBias = kKvBits<KV> == 8 ? 0x47000000u : 0x43000000u, kRest = kKvBits<KV> == 8 ? 0x7404u : 0x7044u;
  return __uint_as_float(ptx::prmt(bytes, kBias, kRest | byte << (kKvBits<KV> == 8 ? 4 : 8)));
}

// Eight values of 8- or 4-bit integers as T.
template <class KV, class T>
__device__ __forceinline__ Vec<T> kv_values(const unsigned* words, float2 scale) {
  static_assert(kIsQuantised<KV>);
  const float zero = fmaf(-kByteBias<KV>, scale.x, scale.y);
  unsigned bytes[2];  // int8: values 0-3, 4-7; int4: the even ones, the odd ones
  if constexpr (kKvBits<KV> == 8) bytes[0] = words[0], bytes[1] = words[1];
  else bytes[0] = words[0] & 0x0f0f0f0fu, bytes[1] = words[0] >> 4 & 0x0f0f0f0fu;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int word = kKvBits<KV> == 8 ? i / 4 : i % 2, byte = kKvBits<KV> == 8 ? i % 4 : i / 2;
    values[i] = fmaf(biased<KV>(bytes[word], byte), scale.x, zero);
  }
  Vec<T> packed;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<unsigned*>(&packed)[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  return packed;
}

}  // namespace tilestream::cuda
