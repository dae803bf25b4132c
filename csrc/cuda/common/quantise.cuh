// Quantised activation rows (tilestream/quantise.h) from values in registers.
#pragma once

#include "cuda/common/reduce.cuh"
#include "tilestream/quantise.h"

namespace tilestream::cuda {

constexpr float kSmallestAmax = 1e-36f;        // below it levels / amax would overflow: taken as zero
// 1.5 * 2^23: adding it rounds to the nearest even integer, which is then in the low bits.
constexpr float kRoundingMagic = 12582912.0f;

struct StoreHere {
  template <class V>
  __device__ __forceinline__ void operator()(V* p, V v) const { *p = v; }
};

// Quantises elements i .. i + kSize - 1 of row `row` of k elements. Every lane of the warp takes part; lanes
// hold consecutive elements, the first lane's at a multiple of kScaleK, and those past the row's end hold
// zeros. store(p, v) writes v, of 4 or 8 bytes, to p.
template <int kSize, class Store = StoreHere>
__device__ __forceinline__ void store_quantised(const QuantisedRows& out, int64_t row, int64_t k, int64_t i,
                                                const float (&values)[kSize], Store store = {}) {
  static_assert(kSize == 4 || kSize == 8, "a lane stores its integers in one instruction");
  // The magnitude's bits, and below them whether it is positive: as integers NaN is larger than infinity, that than all numbers.
  unsigned most = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const unsigned bits = __float_as_uint(values[j]) ^ 0x80000000u;
    most = max(most, __funnelshift_l(bits, bits, 1));
  }
#pragma unroll
  for (int distance = kScaleK / kSize / 2; distance > 0; distance /= 2)
    most = max(most, __shfl_xor_sync(kFullMask, most, distance));
  const float amax = __uint_as_float(most >> 1), poison = amax - amax;
  const bool tiny = amax < kSmallestAmax;
  const bool int4 = i < out.k4;
  const float levels = !int4 ? kInt8Levels : most & 1 ? -kInt4Levels : kInt4Levels;
  const float inverse = tiny ? 0.0f : levels / amax + poison, scale = tiny ? 0.0f : amax / levels + poison;
  const float limit = kRoundingMagic + (int4 ? kInt4Most : kInt8Levels);

  unsigned words[kSize / 4];
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kSize; j += 4) {
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fminf(fmaf(values[j + i], inverse, kRoundingMagic), limit));
    words[j / 4] = __byte_perm(__byte_perm(bits[0], bits[1], 0x40), __byte_perm(bits[2], bits[3], 0x40), 0x5410);
    sum = __dp4a(int(words[j / 4]), 0x01010101, sum);
  }
#pragma unroll
  for (int distance = kGroupK / kSize / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kFullMask, sum, distance);

  int64_t at = row * out.row_bytes(k) + (int4 ? i / 2 : out.row_bytes(i));
  bool stores = i < k;
  if (out.k4 > 0) {  // a byte of nibbles has elements 16 apart, which two lanes hold
    constexpr unsigned kLow = 0x0f0f0f0fu;
    constexpr int kDistance = kGroupK / 2 / kSize;
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) {
      const unsigned later = __shfl_xor_sync(kFullMask, words[j], kDistance);
      if (int4) words[j] = (words[j] & kLow) | (later & kLow) << 4;
    }
    if (int4) {
      at += i % kGroupK / 2;  // i / 2 counted half of it
      stores = stores && i % kGroupK < kGroupK / 2;
    }
  }
  if (stores) {
    if constexpr (kSize == 4) store(reinterpret_cast<unsigned*>(out.q + at), words[0]);
    else store(reinterpret_cast<uint2*>(out.q + at), make_uint2(words[0], words[1]));
  }
  if (i >= k) return;
  if (i % kGroupK == 0) store(&out.sum[(row * k + i) / kGroupK], sum);
  if (i % kScaleK == 0) store(&out.scale[row * ceil_div(k, kScaleK) + i / kScaleK], scale);
}

}  // namespace tilestream::cuda
