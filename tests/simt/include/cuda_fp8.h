// __nv_fp8_e4m3 and its pairs, with CUDA's names; conversion saturates, as __NV_SATFINITE does.
#pragma once

#include <cuda_fp16.h>

struct __nv_fp8_e4m3 {
  unsigned char __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float v) : __x((unsigned char)simt::narrow_e4m3(v)) {}
  explicit operator float() const { return simt::widen_e4m3(__x); }
};
struct alignas(2) __nv_fp8x2_e4m3 { unsigned short __x; };
struct alignas(4) __nv_fp8x4_e4m3 { unsigned __x; };
