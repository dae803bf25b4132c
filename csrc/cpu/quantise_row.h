// One row of activations to integers (tilestream/quantise.h), from wherever its values come.
#pragma once

#include <algorithm>

#include "cpu/elements.h"
#include "tilestream/quantise.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// Row `row` of `rows` whose rows have k elements.
inline QuantisedRows row_of(const QuantisedRows& rows, int64_t row, int64_t k) {
  return {rows.q + row * rows.row_bytes(k), rows.scale + row * ceil_div(k, kScaleK), rows.sum + row * (k / kGroupK), rows.k4};
}

// Below this, levels / amax would overflow: such a span is taken as zero.
constexpr float kSmallestAmax = 1e-36f;

// levels / amax and amax / levels of 16 spans; 0 for tiny ones, NaN where amax is NaN or infinite.
inline void span_scales(F32x16 amax, F32x16 levels, float* inverse, float* scale) {
  float limits[16];
  store(limits, amax);
  const F32x16 poison = sub(amax, amax);
  store(inverse, add(div(levels, amax), poison));
  store(scale, add(div(amax, levels), poison));
  for (int i = 0; i < 16; ++i) {
    if (limits[i] < kSmallestAmax) inverse[i] = scale[i] = 0.0f;
  }
}

// 32 integers, the first 16 in the low bytes of `lo`, as 16 bytes of nibbles.
inline void store_nibbles(int8_t* out, F32x16 lo, F32x16 hi) {
  int8_t bytes[2][16];
  store_low_bytes(bytes[0], lo);
  store_low_bytes(bytes[1], hi);
  for (int i = 0; i < 16; i += 8) {
    uint64_t low, high;
    std::memcpy(&low, bytes[0] + i, 8);
    std::memcpy(&high, bytes[1] + i, 8);
    const uint64_t both = (low & 0x0f0f0f0f0f0f0f0f) | (high & 0x0f0f0f0f0f0f0f0f) << 4;
    std::memcpy(out + i, &both, 8);
  }
}

// values(i): elements i .. i + 15 of the row; called twice for each. Sixteen spans' maxima and sixteen groups' sums are
// found together, which leaves no horizontal operation per group.
template <class Values>
inline void quantise_row(Values values, int64_t k, const QuantisedRows& out) {
  const F32x16 magic = set1(kRoundingMagic);
  for (int64_t begin = 0; begin < k; begin += 16 * kScaleK) {
    const int64_t end = k - begin < 16 * kScaleK ? k : begin + 16 * kScaleK;
    const int spans4 = int(std::clamp<int64_t>((out.k4 - begin) / kScaleK, 0, 16));
    F32x16 peaks[16], highest[16];  // highest: of INT4's values, where any is positive
    for (int s = 0; s < 16; ++s) {
      peaks[s] = highest[s] = zero();
      for (int64_t i = begin + s * kScaleK; i < end && i < begin + (s + 1) * kScaleK; i += kGroupK) {
        const F32x16 lo = values(i), hi = values(i + 16);
        peaks[s] = larger_magnitude(peaks[s], larger_magnitude(lo, hi));
        if (s < spans4) highest[s] = max(highest[s], max(lo, hi));
      }
    }
    alignas(64) float inverse[16], scale[16];
    const F32x16 amax = larger_rows(peaks);
    F32x16 levels = set1(kInt8Levels);
    if (spans4 > 0) {
      const F32x16 twice = where_ge(larger_rows(highest), amax, set1(2 * kInt4Levels));
      levels = where_lt(iota(), spans4, sub(set1(kInt4Levels), twice), levels);
    }
    span_scales(amax, levels, inverse, scale);
    std::memcpy(out.scale + begin / kScaleK, scale, 4 * size_t(ceil_div(end - begin, kScaleK)));
    for (int64_t first = begin; first < end; first += 16 * kGroupK) {
      const int num = int(end - first < 16 * kGroupK ? (end - first) / kGroupK : 16);
      F32x16 sums[16];
      for (int g = 0; g < num; ++g) {
        const int64_t i = first + g * kGroupK;
        const F32x16 factor = set1(inverse[(i - begin) / kScaleK]);
        F32x16 lo = fma(values(i), factor, magic), hi = fma(values(i + 16), factor, magic);
        if (i < out.k4) {
          const F32x16 most = set1(kRoundingMagic + kInt4Most);
          lo = min(lo, most), hi = min(hi, most);
          store_nibbles(out.q + i / 2, lo, hi);
        } else {
          store_low_bytes(out.q + out.row_bytes(i), lo);
          store_low_bytes(out.q + out.row_bytes(i) + 16, hi);
        }
        sums[g] = add(sub(lo, magic), sub(hi, magic));  // integers below 2^24: any order of adding is exact
      }
      for (int g = num; g < 16; ++g) sums[g] = zero();
      const I32x16 sum = to_int(add_rows(sums));
      std::memcpy(out.sum + first / kGroupK, &sum, 4 * size_t(num));
    }
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
