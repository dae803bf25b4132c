// Int8 activation rows (tilestream/quantise.h) from values in registers.
#pragma once

#include "cuda/common/reduce.cuh"
#include "tilestream/quantise.h"

namespace tilestream::cuda {

constexpr float kSmallestAmax = 1e-36f;        // below it 127 / amax would overflow: taken as zero
// 1.5 * 2^23: adding it rounds to the nearest even integer, which is then in the low bits.
constexpr float kRoundingMagic = 12582912.0f;

// Quantises elements i .. i + kSize - 1 of row `row` of k elements. Every lane of the warp takes part; lanes
// hold consecutive elements, the first lane's at a multiple of kScaleK, and those past the row's end hold
// zeros.
template <int kSize>
__device__ __forceinline__ void store_quantised(const QuantisedRows& out, int64_t row, int64_t k, int64_t i,
                                                const float (&values)[kSize]) {
  static_assert(kSize == 4 || kSize == 8, "a lane stores its integers in one instruction");
  unsigned amax_bits = 0;  // as integers NaN is larger than infinity, and that than all numbers
#pragma unroll
  for (int j = 0; j < kSize; ++j) amax_bits = max(amax_bits, __float_as_uint(values[j]) & 0x7fffffffu);
#pragma unroll
  for (int distance = kScaleK / kSize / 2; distance > 0; distance /= 2)
    amax_bits = max(amax_bits, __shfl_xor_sync(kFullMask, amax_bits, distance));
  const float amax = __uint_as_float(amax_bits), poison = amax - amax;
  const bool tiny = amax < kSmallestAmax;
  const float inverse = tiny ? 0.0f : 127.0f / amax + poison, scale = tiny ? 0.0f : amax / 127.0f + poison;

  unsigned words[kSize / 4];
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kSize; j += 4) {
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fmaf(values[j + i], inverse, kRoundingMagic));
    words[j / 4] = __byte_perm(__byte_perm(bits[0], bits[1], 0x40), __byte_perm(bits[2], bits[3], 0x40), 0x5410);
    sum = __dp4a(int(words[j / 4]), 0x01010101, sum);
  }
#pragma unroll
  for (int distance = kGroupK / kSize / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kFullMask, sum, distance);

  if (i >= k) return;
  if constexpr (kSize == 4) *reinterpret_cast<unsigned*>(out.q + row * k + i) = words[0];
  else *reinterpret_cast<uint2*>(out.q + row * k + i) = make_uint2(words[0], words[1]);
  if (i % kGroupK == 0) out.sum[(row * k + i) / kGroupK] = sum;
  if (i % kScaleK == 0) out.scale[row * ceil_div(k, kScaleK) + i / kScaleK] = scale;
}

}  // namespace tilestream::cuda
