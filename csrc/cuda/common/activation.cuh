// The activations of gated layers.
//
// Both are x * sigmoid(s): SiLU with s = x; tanh-GELU with s = 2 sqrt(2/pi) (x + 0.044715 x^3), since
// (1 + tanh(u)) / 2 = sigmoid(2u). Written x / (1 + e^-s), which saturates rightly at both ends.
#pragma once

#include "cuda/ptx/math.cuh"
#include "cuda/runtime.cuh"
#include "tilestream/activation.h"

namespace tilestream::cuda {

constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kGeluCubic = 0.044715f;
constexpr float kFloatMax = 3.402823466e38f;
constexpr float kLog2e = 1.44269504f;

// fast: with the approximate division and exponential, for results that are rounded to 16 bits.
__device__ __forceinline__ float activate(Activation activation, bool fast, float x) {
  const float s = activation == Activation::kSilu ? x : 2.0f * kSqrt2OverPi * (x * fmaf(x * x, kGeluCubic, 1.0f));
  // -inf becomes the smallest float: it then gives -0, not inf/inf. A NaN stays: no comparison with it holds.
  const float bounded = x < -kFloatMax ? -kFloatMax : x;
  if (fast) return __fdividef(bounded, 1.0f + ptx::ex2_approx(-kLog2e * s));
  return bounded / (1.0f + expf(-s));
}

}  // namespace tilestream::cuda
