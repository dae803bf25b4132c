// e4m3 pairs to halves and back on every target: the conversion instructions from sm_89 on, integers before that. Same bits.
#pragma once

#include "cuda/ptx/fp8.cuh"
#include "cuda/ptx/math.cuh"

namespace tilestream::cuda {

// Widened to a half an e4m3 keeps its bits, shifted, and lacks 8 in the exponent's bias (15 against 7).
__device__ __forceinline__ unsigned e4m3x2_to_f16x2_by_integers(unsigned short a) {
  const unsigned spread = ptx::prmt(a, 0, 0x1404);  // each byte into the upper half of 16 bits
  const unsigned nan = ((spread & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
  const unsigned small = (spread & 0x80008000u) | (spread & 0x7f007f00u) >> 1;
  const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(small), __half2half2(__ushort_as_half(0x5c00)));  // 256
  return (reinterpret_cast<const unsigned&>(scaled) | (nan - (nan >> 15))) & ~nan;
}

__device__ __forceinline__ unsigned f32_to_e4m3_by_integers(float x) {
  if (x != x) return 0x7f;
  const float magnitude = fminf(fabsf(x), 448.0f);
  const unsigned bits = __float_as_uint(magnitude), sign = __float_as_uint(x) >> 31 << 7;
  constexpr unsigned kBias = (127 - 7) << 3;
  // Below 2^-6 a step is 2^-9, which is a float's step at 2^14: the addition rounds.
  if (magnitude < 0.015625f) return sign | (__float_as_uint(magnitude + 16384.0f) - __float_as_uint(16384.0f));
  return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - kBias);
}

// Two halves of two e4m3, the lower byte's in the lower bits.
__device__ __forceinline__ unsigned e4m3x2_to_f16x2(unsigned short a) {
  if constexpr (ptx::kHasCvtE4m3) return ptx::cvt_f16x2_e4m3x2(a);
  else return e4m3x2_to_f16x2_by_integers(a);
}

// Rounded to nearest even and saturated at 448, `low` into the lower byte.
__device__ __forceinline__ unsigned short f32_to_e4m3x2(float low, float high) {
  if constexpr (ptx::kHasCvtE4m3) return ptx::cvt_e4m3x2(low, high);
  else return (unsigned short)(f32_to_e4m3_by_integers(low) | f32_to_e4m3_by_integers(high) << 8);
}

}  // namespace tilestream::cuda
