// Arithmetic that C++ has no name for. Registers only: no volatile, no "memory". Twin: tests/simt/include/cuda/ptx/math.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// 2^x with a relative error up to 2^-22; 2^-inf = 0. PTX ISA 9.7.3.21, sm_20.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Any function of three bits, bitwise: kTable is f(0xf0, 0xcc, 0xaa). PTX ISA 9.7.8.6, sm_50.
template <int kTable>
__device__ __forceinline__ unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of b:a. PTX ISA 9.7.9.7, sm_20.
__device__ __forceinline__ unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Two floats rounded to nearest even and packed, `low` into the lower bits. PTX ISA 9.7.9.22, sm_80.
__device__ __forceinline__ unsigned cvt_bf16x2(float low, float high) {
  unsigned d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ unsigned cvt_f16x2(float low, float high) {
  unsigned d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// x, of which the compiler does not know where it comes from: what one loop derives from it is not kept in registers
// through another. No instruction; volatile, so that two of them stay two.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace tilestream::ptx
