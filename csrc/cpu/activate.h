// The activations of gated layers, 16 lanes at a time.
//
// Both are x * sigmoid(s): SiLU with s = x; tanh-GELU with s = 2 sqrt(2/pi) (x + 0.044715 x^3), since
// (1 + tanh(u)) / 2 = sigmoid(2u). Written x / (1 + 2^(-s log2 e)), which saturates rightly at both ends.
#pragma once

#include "cpu/simd/vec.h"
#include "tilestream/activation.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

constexpr float kLog2E = 1.44269504f;
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kFloatMax = 3.402823466e38f;

template <Activation A>
inline F32x16 activate(F32x16 x) {
  F32x16 exponent;  // -s * log2(e)
  if constexpr (A == Activation::kSilu) {
    exponent = mul(x, set1(-kLog2E));
  } else {
    const F32x16 factor = fma(mul(x, x), set1(kGeluCubic), set1(1.0f));
    exponent = mul(mul(x, factor), set1(-2.0f * kSqrt2OverPi * kLog2E));
  }
  // -inf becomes the smallest float: it then gives -0, not inf/inf. NaN passes: it is max's second operand.
  return div(max(set1(-kFloatMax), x), add(set1(1.0f), exp2_weight(exponent)));
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
