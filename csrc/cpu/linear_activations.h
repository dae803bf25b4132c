// Activations as the tile kernels of linear.cpp read them.
//
// Group-quantised weights: a tile of R rows is stored group by group, for each group
//     int8 q[R][32], float scale[R], then per row what the group's zero point needs:
//     no zeros stored: int32 -offset * sum(q)  (the integer accumulator starts there, so it costs nothing)
//     zeros stored:    float scale * sum(q)    (multiplied by the weight's zero)
// q = round(x * 127 / amax), to nearest even; amax = max|x| of the group. A group with a NaN or an infinity
// gets scale NaN, so that all of the row's outputs are NaN and no other row notices.
// bfloat16 weights: rows of bfloat16, K padded to even with 0. float32 weights: rows of float32.
#pragma once

#include "cpu/elements.h"
#include "cpu/packed_group.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

constexpr int64_t kRowGroupBytes = kGroupK + 8;  // of one row and group: q, scale, zero term

// Below this, 127 / amax would overflow: such a group is taken as zero.
constexpr float kSmallestAmax = 1e-36f;

// 127 / amax and amax / 127 of 16 groups; 0 for tiny ones, NaN where amax is NaN or infinite.
inline void group_scales(F32x16 amax, float* inverse, float* scale) {
  float limits[16];
  store(limits, amax);
  const F32x16 poison = sub(amax, amax);
  store(inverse, add(div(set1(127.0f), amax), poison));
  store(scale, add(div(amax, set1(127.0f)), poison));
  for (int i = 0; i < 16; ++i) {
    if (limits[i] < kSmallestAmax) inverse[i] = scale[i] = 0.0f;
  }
}

// Quantises one row into its place in a tile: row `row` of `num_rows`. Sixteen groups at a time, so that
// their maxima and sums are found together.
template <class E, PackedFormat F>
void quantise_row(const typename E::Storage* x, int64_t k, int row, int num_rows, uint8_t* tile) {
  using Layout = GroupLayout<F>;
  const F32x16 magic = set1(kRoundingMagic);
  const int64_t num_groups = k / kGroupK, group_bytes = num_rows * kRowGroupBytes;
  for (int64_t begin = 0; begin < num_groups; begin += 16) {
    const int num = int(num_groups - begin < 16 ? num_groups - begin : 16);
    const auto* from = x + begin * kGroupK;
    uint8_t* to = tile + begin * group_bytes;
    F32x16 peaks[16], sums[16];
    for (int g = 0; g < num; ++g)
      peaks[g] = larger_magnitude(E::load(from + g * kGroupK), E::load(from + g * kGroupK + 16));
    for (int g = num; g < 16; ++g) peaks[g] = sums[g] = zero();
    alignas(64) float inverse[16], scale[16], term[16];
    group_scales(larger_rows(peaks), inverse, scale);
    for (int g = 0; g < num; ++g) {
      const F32x16 factor = set1(inverse[g]);
      const F32x16 lo = fma(E::load(from + g * kGroupK), factor, magic);
      const F32x16 hi = fma(E::load(from + g * kGroupK + 16), factor, magic);
      int8_t* q = reinterpret_cast<int8_t*>(to + g * group_bytes) + row * kGroupK;
      store_low_bytes(q, lo);
      store_low_bytes(q + 16, hi);
      sums[g] = add(sub(lo, magic), sub(hi, magic));  // integers below 2^24: any order of adding is exact
    }
    const F32x16 sum = add_rows(sums);
    if constexpr (Layout::kHasZero) {
      store(term, mul(sum, load(scale)));
    } else {
      const I32x16 start = to_int(mul(sum, set1(-float(Layout::kOffset))));
      std::memcpy(term, &start, sizeof(term));
    }
    uint8_t* scales = to + num_rows * kGroupK + 4 * row;
    for (int g = 0; g < num; ++g, scales += group_bytes) {
      std::memcpy(scales, scale + g, 4);
      std::memcpy(scales + 4 * num_rows, term + g, 4);
    }
  }
}

template <class E>
void row_to_bf16(const typename E::Storage* x, int64_t k, uint16_t* out) {
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) store_bf16x32(out + i, cvt_bf16x32(E::load(x + i), E::load(x + i + 16)));
  if (i < k) {
    alignas(64) uint16_t last[32];
    const int64_t rest = k - i;
    store_bf16x32(
        last, cvt_bf16x32(load_part<E>(x + i, rest), load_part<E>(x + i + 16, rest > 16 ? rest - 16 : 0)));
    std::memcpy(out + i, last, size_t(round_up(rest, 2)) * 2);
  }
}

template <class E>
void row_to_float(const typename E::Storage* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 16) store_part<Float32>(out + i, load_part<E>(x + i, k - i), k - i);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
