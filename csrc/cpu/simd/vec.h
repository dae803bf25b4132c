// Sixteen lanes of float32 or int32, the same functions on every SIMD level. The only folder with intrinsics.
//
// A kernel file is compiled once per level, with TILESTREAM_LEVEL naming the level's namespace, and includes
// this header. Everything here is in that namespace, so no inline function of one level can be merged by the
// linker with another level's (a portable caller would then run AVX-512 code).
//
// Vocabulary (F = F32x16, I = I32x16, P = Bf16x32, B = U8x64):
//   F load(const float*), void store(float*, F), F set1(float), F zero()         unaligned is fine
//   F load_bf16/load_f16(const uint16_t*), load_u8(const uint8_t*), load_s8(const int8_t*)   16 values
//   void load_f16_pairs(const uint16_t*, F& first, F& second)                     16 pairs, apart
//   void store_bf16/store_f16(uint16_t*, F)                                       round to nearest even
//   F load_e4m3(const uint8_t*), void store_e4m3(uint8_t*, F)                    beyond 448 becomes 448; NaN stays NaN
//   P e4m3_pairs<i>(B)                         bytes 2 i and 2 i + 1 of every four, exactly
//   F load_first(const float*, int n), store_first(float*, F, int n)              n in 0..16 lanes; others 0
//   add sub mul div max min fma(a, b, c) = a * b + c, rounded once where the level has FMA
//   F where_lt(I a, int n, F yes, F no)        lane-wise a < n ? yes : no;   I iota()
//   F where_ge(F a, F b, F yes)                lane-wise a >= b ? yes : 0
//   uint32_t lanes_ge(F a, F b)                bit i: a[i] >= b[i]
//   int store_lanes(float*, F, uint32_t lanes) the chosen lanes, one after another; may write 16; returns how many
//   FixedSum no_mass(), add_mass(FixedSum, F w), add_mass_ge(FixedSum, F a, F b, F w)   exact sums of weights in fixed
//   uint64_t reduce_mass(FixedSum)             point (kFixedPoint below); _ge: of the lanes with a >= b
//   F larger_magnitude(F, F)                   max(|a|, |b|), NaN if either is
//   F add_rows(const F (&)[16])                lane i = sum of vector i; add_rows and larger_rows (by larger_magnitude,
//   F larger_rows(const F (&)[16])             of vectors without sign bits) have one fixed order
//   F evens(F a, F b), odds(F a, F b)          every second lane of a, then of b, from the first or the second on
//   float reduce_add(F), reduce_max(F);  F exp2(F);  F round_nearest(F)
//   void load_no_earlier()                     the compiler moves no load above it: registers stay free until then
//   V in_register(V)       the same value, kept in a register where the level has enough of them
//   F exp2_weight(F)       exp2 for softmax weights: exact at 0 and -inf; denormal results may be denormal or 0
//   P load_bf16x32(const void*), P set1_bf16_pair(uint32_t), P cvt_bf16x32(F lo, F hi)
//   P bf16_pairs(F first, F second)            lane i: first[i], second[i]; denormals as cvt_bf16x32
//   F dot_bf16(F acc, P a, P b)                acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1]
//   void store_low_bytes(int8_t*, F)           the lowest byte of each lane: see kRoundingMagic
//   B load_u8x64(const void*), void store_u8x64(void*, B), B and_0f(B), B shift_right_4(B)  (each byte >> 4)
//   I dot_u8s8(I acc, B a, int32_t b4)         acc[i] += sum_j a[4i + j] * b[j], exact
//   Nibbles begin_u4(I start), dot_u4s8(Nibbles, B, int32_t b4), I end_u4(Nibbles, I start)   the same for a < 16 and at
//                                              most 8 steps from begin to end: 16-bit sums where that is faster
//   F to_float(I), I to_int(F) (nearest even), I izero(), I set1_int(int32_t), void store_s8(int8_t*, I) (values fit)
//   void store_digits(int8_t* high, int8_t* low, I)   each lane as 128 * high + low, 0 <= low < 128; |lane| <= 127 * 128
//   F byte_minus<i>(B, int n)                  byte i of every four, less n
#pragma once

#include <cstdint>
#include <cstring>

#ifndef TILESTREAM_LEVEL
#error "compile with -DTILESTREAM_LEVEL=portable|avx2|avx512|avx512_vnni"
#endif

namespace tilestream::cpu::TILESTREAM_LEVEL {

// A weight in [0, 1] plus this has an ulp of 2^-44: its bits are the weight in fixed point, rounded to nearest even. Sums of
// these (FixedSum keeps them with the bits of kFixedPoint itself, which the reduction takes off) are exact in any order.
constexpr double kFixedPoint = 384.0;
constexpr int64_t kFixedPointBits = 0x4078000000000000;

}  // namespace tilestream::cpu::TILESTREAM_LEVEL

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.h"
#else
#include "cpu/simd/vec_portable.h"
#endif

namespace tilestream::cpu::TILESTREAM_LEVEL {

// a + kRoundingMagic rounds |a| < 2^22 to an integer (to nearest even) whose two's complement stands in the low bits.
constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23

// 2^x by range reduction to [-1/2, 1/2] and a degree-6 minimax polynomial: at most 2 ulp for x >= -126;
// 0 below (also for -inf), inf above 128, NaN for NaN.
inline F32x16 exp2(F32x16 x) {
  const F32x16 n = round_nearest(x);
  const F32x16 f = sub(x, n);
  F32x16 p = set1(1.5353362e-4f);
  p = fma(p, f, set1(1.3398874e-3f));
  p = fma(p, f, set1(9.6184370e-3f));
  p = fma(p, f, set1(5.5503324e-2f));
  p = fma(p, f, set1(2.4022648e-1f));
  p = fma(p, f, set1(6.9314720e-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_pow2(p, n, x);
}

#if !defined(__AVX512F__)
inline FixedSum add_mass_ge(FixedSum s, F32x16 a, F32x16 b, F32x16 w) { return add_mass(s, where_ge(a, b, w)); }
inline F32x16 exp2_weight(F32x16 x) { return exp2(x); }
template <class V>
inline V in_register(V a) { return a; }
#endif

// e4m3 has 7 for an exponent bias, no infinity, and one NaN, the magnitude 0x7f. With the exponent moved to float's bias a
// magnitude is y; where the exponent field is 0 there is no hidden bit, and 2 y - 2^-6, smaller only there, is meant.
inline F32x16 load_e4m3(const uint8_t* p) {
  int32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = ((p[i] & 0x7f) << 20) + (120 << 23);
  F32x16 y;
  std::memcpy(&y, bits, sizeof(bits));
  y = min(y, add(y, sub(y, set1(0x1p-6f))));
  std::memcpy(bits, &y, sizeof(bits));
  for (int i = 0; i < 16; ++i) bits[i] |= ((p[i] & 0x7f) == 0x7f ? 0x7fc00000 : 0) | (p[i] & 0x80) << 24;
  std::memcpy(&y, bits, sizeof(bits));
  return y;
}
// The same backwards. Where the exponent field will be 0, codes are 2^-9 apart, as floats from 2^14 on are: adding that rounds.
inline void store_e4m3(uint8_t* p, F32x16 a) {
  const F32x16 magnitude = min(abs(a), set1(448.0f));
  const F32x16 rounded = sub(add(magnitude, set1(0x1p14f)), set1(0x1p14f));
  const F32x16 y = max(magnitude, mul(add(rounded, set1(0x1p-6f)), set1(0.5f)));
  int32_t bits[16], given[16];
  std::memcpy(bits, &y, sizeof(bits));
  std::memcpy(given, &a, sizeof(given));
  for (int i = 0; i < 16; ++i) {
    const int32_t code = ((bits[i] + 0x7ffff + (bits[i] >> 20 & 1)) >> 20) - (120 << 3);
    p[i] = uint8_t(((given[i] & 0x7fffffff) > 0x7f800000 ? 0x7f : code) | (given[i] >> 24 & 0x80));
  }
}

inline void load_no_earlier() { asm volatile("" ::: "memory"); }

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) {
  uint16_t lanes[16] = {h};
  float out[16];
  store(out, load_f16(lanes));
  return out[0];
}
inline uint16_t float_to_f16(float f) {
  uint16_t out[16];
  store_f16(out, set1(f));
  return out[0];
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
