// One row of RMS normalisation, in two passes over it.
//
// Squares are summed in 4 x 16 lanes in a fixed order, so a row's result depends on nothing but the row.
// values(i, num): elements i .. i + num - 1 of a row, num at most 16.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/quantise_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

constexpr int64_t kLanes = 16;
constexpr int kChains = 4;  // independent sums: hides the latency of the addition

template <class E, class Values>
inline void store_values(const Values& values, int64_t begin, int64_t end, typename E::Storage* out) {
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) E::store_pair(out + i, values(i, kLanes), values(i + kLanes, kLanes));
  for (; i < end; i += kLanes) {
    const int64_t num = std::min(end - i, kLanes);
    store_part<E>(out + i, values(i, num), num);
  }
}

// Elements begin .. end - 1 of `row` are read after prepare(begin, end).
template <class E, class Prepare>
inline float sum_squares(const typename E::Storage* row, int64_t hidden, const Prepare& prepare) {
  F32x16 sums[kChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kChains * kLanes <= hidden; i += kChains * kLanes) {
    prepare(i, i + kChains * kLanes);
    for (int c = 0; c < kChains; ++c) {
      const F32x16 v = E::load(row + i + c * kLanes);
      sums[c] = fma(v, v, sums[c]);
    }
  }
  for (int c = 0; i < hidden; i += kLanes, ++c) {
    const int64_t num = std::min(hidden - i, kLanes);
    prepare(i, i + num);
    const F32x16 v = load_part<E>(row + i, num);
    sums[c] = fma(v, v, sums[c]);
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// out = round(values), and the sum of squares of that.
template <class E, class Values>
inline float store_and_sum_squares(const Values& values, int64_t hidden, typename E::Storage* out) {
  return sum_squares<E>(out, hidden, [&](int64_t begin, int64_t end) { store_values<E>(values, begin, end, out); });
}

inline float inverse_norm(float squares, int64_t hidden, float eps) { return 1.0f / std::sqrt(squares / float(hidden) + eps); }

// The normalised row as values.
template <class E>
inline auto scaled(const typename E::Storage* row, const float* weight, float inverse) {
  return [row, weight, scale = set1(inverse)](int64_t i, int64_t num) {
    return mul(mul(load_part<E>(row + i, num), scale), load_part<Float32>(weight + i, num));
  };
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
