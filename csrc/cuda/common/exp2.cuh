// 2^x on the FMA pipes, for when the special function units (16 a cycle of a multiprocessor) are what a kernel waits for.
// FlashAttention-4 does so on Blackwell; on Hopper a head dim of 64 needs as many cycles of exponentials as of products.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::cuda {

// x from -inf to 127, relative error up to 3e-6; exactly 0 up to -127. Nine instructions.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: what is added to it is rounded to an integer in its low bits
  x = fmaxf(x, -127.0f);
  const float rounded = x + kRound, f = x - (rounded - kRound);  // f: -1/2 to 1/2
  // Minimax of the relative error among polynomials that are 1 at 0: at x = -127 the exponents below cancel to 0.
  float p = fmaf(f, 0.00958284922f, 0.0559064336f);
  p = fmaf(f, p, 0.240240991f);
  p = fmaf(f, p, 0.693124175f);
  p = fmaf(f, p, 1.0f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}

}  // namespace tilestream::cuda
