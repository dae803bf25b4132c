// CUDA's mathematical functions. The fast ones round as the exact ones: a kernel may rely on no better than their
// documented error, which the exact ones satisfy.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>

#include "simt/twin.h"

template <class T>
constexpr SIMT_TWIN T max(T a, T b) { return a < b ? b : a; }
template <class T>
constexpr SIMT_TWIN T min(T a, T b) { return b < a ? b : a; }
SIMT_TWIN float max(float a, float b) { return fmaxf(a, b); }  // CUDA: of a number and a NaN, the number
SIMT_TWIN float min(float a, float b) { return fminf(a, b); }

inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __expf(float x) { return float(std::exp(double(x))); }
inline float __exp2f(float x) { return float(std::exp2(double(x))); }
inline float __exp10f(float x) { return float(std::pow(10.0, double(x))); }
inline float exp10f(float x) { return __exp10f(x); }
inline float __logf(float x) { return float(std::log(double(x))); }
inline float __log2f(float x) { return float(std::log2(double(x))); }
inline float __sinf(float x) { return float(std::sin(double(x))); }
inline float __cosf(float x) { return float(std::cos(double(x))); }
inline void sincosf(float x, float* s, float* c, int) { *s = sinf(x), *c = cosf(x); }
inline float __powf(float x, float y) { return float(std::pow(double(x), double(y))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

namespace simt {
// float to integer as the GPU does: saturated, NaN is 0.
template <class I>
inline I to_integer(float x) {
  if (x != x) return 0;
  constexpr double low = double(std::is_signed_v<I> ? -2147483648.0 : 0.0),
                   high = std::is_signed_v<I> ? 2147483647.0 : 4294967295.0;
  return I(double(x) < low ? low : double(x) > high ? high : double(x));
}
}  // namespace simt
inline int __float2int_rn(float x) { return simt::to_integer<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return simt::to_integer<int>(truncf(x)); }
inline int __float2int_rd(float x) { return simt::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return simt::to_integer<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return simt::to_integer<unsigned>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return simt::to_integer<unsigned>(truncf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero((unsigned long long)x) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return unsigned(((unsigned long long)high << 32 | low) >> (n & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return unsigned(((unsigned long long)high << 32 | low) << (n & 31) >> 32);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int((signed char)(a >> 8 * i)) * int((signed char)(b >> 8 * i));
  return c;
}
