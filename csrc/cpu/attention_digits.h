// Integer products for int8 and int4 caches: the float operand (a row of q, or a row's weights) becomes digits in
// base 128, each a signed byte, and every digit is one row of the integer product. Integer sums are exact, so the
// only error is the rounding of the operand to 2^-15 (two digits) or 2^-22 (three) of its largest magnitude.
//   q . k   = k_scale_j * (q . k_int) + k_zero_j * sum(q)
//   sum p v = sum_j w_j * v_int + sum_j w_j * (v_zero_j / v_scale_j),  w_j = p_j * v_scale_j
// Both terms of a sum use the rounded operand, so that its rounding acts on k or v, not on their distance from zero.
#pragma once

#include <cfloat>

#include "cpu/attention_tile.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// Of the tile's keys. V's are 0 for keys outside the job, whose memory may hold NaN.
struct TileScales {
  float k_scale[kTileKeys], k_zero[kTileKeys], v_scale[kTileKeys], v_zero_steps[kTileKeys];  // zero / scale
};

constexpr int kMaxDigits = 3;
constexpr float kDigitLimit[kMaxDigits + 1] = {0, 127, 127 * 128, 127 * 128 * 128};
constexpr float kDigitValue[kMaxDigits] = {1, 128, 128 * 128};

struct Digits {
  float factor;  // x = factor * digits; NaN where x holds a NaN or an infinity
  float dot;     // sum of digits * other
};

// x [num] (a multiple of 16) as `num_digits` rows of num signed bytes at `digits`, the highest first.
// other: [num], or null for ones.
Digits to_digits(const float* x, const float* other, int num, int num_digits, uint32_t* digits) {
  F32x16 most = zero(), check = zero(), dot = zero();
  for (int i = 0; i < num; i += 16) {
    most = max(most, abs(load(x + i)));
    check = fma(load(x + i), zero(), check);
  }
  const float largest = reduce_max(most);
  const float limit = kDigitLimit[num_digits];
  const float inverse = largest > FLT_MIN * limit ? limit / largest : 0.0f;
  int8_t* bytes = reinterpret_cast<int8_t*>(digits);
  for (int i = 0; i < num; i += 16) {
    F32x16 rest = round_nearest(mul(load(x + i), set1(inverse)));
    dot = fma(rest, other != nullptr ? load(other + i) : set1(1.0f), dot);
    for (int k = 0; k < num_digits; ++k) {
      const float value = kDigitValue[num_digits - 1 - k];
      const F32x16 digit = round_nearest(mul(rest, set1(1.0f / value)));
      store_s8(bytes + int64_t(k) * num + i, to_int(digit));
      rest = fma(digit, set1(-value), rest);
    }
  }
  return {largest / limit + reduce_add(check), reduce_add(dot)};
}

// The value of `num_digits` rows of products, each `stride` floats apart.
inline F32x16 from_digits(const float* products, int num_digits, int64_t stride) {
  F32x16 value = load(products);
  for (int k = 1; k < num_digits; ++k) value = fma(value, set1(128.0f), load(products + k * stride));
  return value;
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
