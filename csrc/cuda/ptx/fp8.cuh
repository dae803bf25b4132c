// e4m3 (sign, 4 bits of exponent, 3 of mantissa; no infinity, largest 448) in pairs. PTX ISA 9.7.9.22 (cvt), sm_89: before
// that use common/fp8.cuh. Registers only: no volatile, no "memory". Twin: tests/simt/include/cuda/ptx/fp8.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Whether the target has the instructions below; a branch of `if constexpr` on it keeps them out of older targets.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr bool kHasCvtE4m3 = true;
#else
constexpr bool kHasCvtE4m3 = false;
#endif

// Two floats rounded to nearest even, `low` into the lower byte. Saturates at 448, infinities too; NaN gives 0x7f.
__device__ __forceinline__ unsigned short cvt_e4m3x2(float low, float high) {
  unsigned short d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
// Two halves, exactly, the lower byte's in the lower bits. NaN gives 0x7fff.
__device__ __forceinline__ unsigned cvt_f16x2_e4m3x2(unsigned short a) {
  unsigned d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(a));
  return d;
}

}  // namespace tilestream::ptx
