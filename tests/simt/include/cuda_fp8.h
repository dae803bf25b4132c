// __nv_fp8_e4m3 and its pairs, with CUDA's names; conversion saturates, as __NV_SATFINITE does.
#pragma once

#include <cuda_fp16.h>

struct __nv_fp8_e4m3 {
  unsigned char __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float v) : __x((unsigned char)simt::narrow_e4m3(v)) {}
  explicit operator float() const { return simt::widen_e4m3(__x); }
};
// Pairs of bytes, the first value in the low one.
using __nv_fp8x2_storage_t = unsigned short;
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
struct __half2_raw {
  unsigned short x, y;
  operator __half2() const { return {__ushort_as_half(x), __ushort_as_half(y)}; }
};
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t pair, __nv_fp8_interpretation_t) {
  return {__half(simt::widen_e4m3(pair & 0xff)).x, __half(simt::widen_e4m3(pair >> 8)).x};
}
struct alignas(2) __nv_fp8x2_e4m3 { unsigned short __x; };
struct alignas(4) __nv_fp8x4_e4m3 { unsigned __x; };
