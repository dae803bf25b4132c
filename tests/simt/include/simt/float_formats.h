// Narrow floats to float, exactly, and back, rounded to nearest even: any format with up to 8 exponent bits.
#pragma once

#include <cstdint>

#include "simt/twin.h"

namespace simt {

// Bits of `x` in a format of kExponent and kMantissa bits with the IEEE bias; overflow gives infinity.
template <int kExponent, int kMantissa>
inline uint32_t narrow(float x) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1, kShift = 23 - kMantissa;
  constexpr uint32_t kInf = ((1u << kExponent) - 1) << kMantissa;
  const uint32_t all = bits<uint32_t>(x), sign = all >> 31 << (kExponent + kMantissa), magnitude = all & 0x7fffffff;
  if (magnitude > 0x7f800000) return (1u << (kExponent + kMantissa)) - 1;  // the canonical NaN: all ones but the sign
  const int exponent = int(magnitude >> 23) - 127 + kBias;  // of the result
  uint32_t mantissa = magnitude & 0x7fffff;
  if (kExponent == 8) {  // same range: subnormals too
    const uint32_t rounded = magnitude + (1u << (kShift - 1)) - 1 + (magnitude >> kShift & 1);
    return sign | (magnitude == 0x7f800000 ? kInf : rounded >> kShift);
  }
  if (exponent >= (1 << kExponent) - 1) return sign | kInf;
  if (exponent <= 0) {  // subnormal in the result
    if (exponent < -kMantissa) return sign;
    mantissa |= 0x800000;
    const int shift = kShift + 1 - exponent;
    const uint32_t half = 1u << (shift - 1), rest = mantissa & ((1u << shift) - 1), kept = mantissa >> shift;
    return sign | (kept + (rest > half || (rest == half && (kept & 1))));
  }
  const uint32_t joined = uint32_t(exponent) << 23 | mantissa;
  return sign | (joined + (1u << (kShift - 1)) - 1 + (joined >> kShift & 1)) >> kShift;  // may carry into infinity: right
}

template <int kExponent, int kMantissa>
inline float widen(uint32_t narrow_bits) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  const uint32_t sign = narrow_bits >> (kExponent + kMantissa) & 1;
  const uint32_t exponent = narrow_bits >> kMantissa & ((1u << kExponent) - 1);
  uint32_t mantissa = narrow_bits & ((1u << kMantissa) - 1);
  uint32_t result;
  if (exponent == (1u << kExponent) - 1) {
    result = 0x7f800000 | mantissa << (23 - kMantissa);
  } else if (exponent == 0 && kExponent < 8) {
    if (mantissa == 0) return bits<float>(sign << 31);
    int e = 1 - kBias + 127;
    while ((mantissa >> kMantissa) == 0) mantissa <<= 1, --e;
    result = uint32_t(e) << 23 | (mantissa & ((1u << kMantissa) - 1)) << (23 - kMantissa);
  } else {
    result = (exponent - kBias + 127) << 23 | mantissa << (23 - kMantissa);
  }
  return bits<float>(result | sign << 31);
}

// e4m3 has no infinity: exponent 15 with mantissa 7 is NaN, the largest value is 448, and conversion saturates.
inline uint32_t narrow_e4m3(float x) {
  if (x != x) return 0x7f;
  const uint32_t sign = bits<uint32_t>(x) >> 31 << 7;
  const float magnitude = x < 0 ? -x : x;
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude >= 256.0f) {  // exponent 15: beyond the IEEE-like range that narrow() knows
    const uint32_t kept = narrow<4, 3>(magnitude / 2);
    return sign | (kept + 8 > 0x7e ? 0x7e : kept + 8);
  }
  return sign | narrow<4, 3>(magnitude);
}
inline float widen_e4m3(uint32_t b) {
  if ((b & 0x7f) == 0x7f) return bits<float>(0x7fffffffu);
  if ((b & 0x78) == 0x78) return 2 * widen<4, 3>(b - 8);
  return widen<4, 3>(b);
}

}  // namespace simt
