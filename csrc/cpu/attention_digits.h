// Integer products for int8 and int4 caches under a 16-bit q: the float operand (a row of q, or a row's weights)
// becomes two digits in base 128, each a signed byte, and each digit one row of the integer product. Integer sums are
// exact, so the only error is the rounding of the operand to 2^-15 of its largest magnitude.
//   q . k   = k_scale_j * (q . k_int) + k_zero_j * sum(q)
//   sum p v = sum_j w_j * v_int + sum_j p_j * v_zero_j,  w_j = p_j * v_scale_j
// Under a float32 q the products are of floats, and only the scaling below is shared.
#pragma once

#include <cfloat>

#include "cpu/attention_tile.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// x [num] (a multiple of 16) as two rows of num signed bytes at `digits`, the higher first: x = factor * digits.
// Returns the factor: NaN where x holds a NaN or an infinity.
inline float to_digits(const float* x, int num, uint32_t* digits) {
  constexpr float kLimit = 127 * kDigitBase;
  F32x16 most = zero(), check = zero();
  for (int i = 0; i < num; i += 16) {
    most = max(most, abs(load(x + i)));
    check = fma(load(x + i), zero(), check);
  }
  const float largest = reduce_max(most);
  const float inverse = largest > FLT_MIN * kLimit ? kLimit / largest : 0.0f;
  int8_t* bytes = reinterpret_cast<int8_t*>(digits);
  for (int i = 0; i < num; i += 16) store_digits(bytes + i, bytes + num + i, to_int(mul(load(x + i), set1(inverse))));
  return largest / kLimit + reduce_add(check);
}

// The weights p [kTileKeys] of one row become p * v_scale. Returns what V's zeros add to the row.
inline float scale_weights(float* p, const TileScales& scales) {
  F32x16 sum = zero();
  for (int j = 0; j < kTileKeys; j += 16) {
    sum = fma(load(p + j), load(scales.v_zero + j), sum);
    store(p + j, mul(load(p + j), load(scales.v_scale + j)));
  }
  return reduce_add(sum);
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
