// AVX-512 (F, BW, DQ, VL) form of vec.h; VNNI and BF16 instructions where the level has them.
#pragma once

#include <immintrin.h>

namespace tilestream::cpu::TILESTREAM_LEVEL {

using F32x16 = __m512;
using I32x16 = __m512i;
struct Bf16x32 { __m512i v; };
struct U8x64 { __m512i v; };

inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a); }
inline F32x16 set1(float a) { return _mm512_set1_ps(a); }
inline F32x16 zero() { return _mm512_setzero_ps(); }
inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
inline F32x16 load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_first(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

inline F32x16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline F32x16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void load_f16_pairs(const uint16_t* p, F32x16& first, F32x16& second) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}
inline F32x16 load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32x16 load_s8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Round to nearest even by integer arithmetic: vcvtneps2bf16 flushes denormals, this does not.
inline __m256i bf16_bits(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
inline void store_bf16(uint16_t* p, F32x16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits(a)); }
inline void store_f16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

inline F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
inline F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
inline F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
inline F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 abs(F32x16 a) { return _mm512_abs_ps(a); }
inline I32x16 iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline F32x16 where_lt(I32x16 a, int n, F32x16 yes, F32x16 no) {
  return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a, _mm512_set1_epi32(n)), no, yes);
}
inline F32x16 where_ge(F32x16 a, F32x16 b, F32x16 yes) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), yes);
}
inline uint32_t lanes_ge(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// Compressed in a register: Zen 4's compressing store is a hundred times slower.
inline int store_lanes(float* p, F32x16 a, uint32_t lanes) {
  store(p, _mm512_maskz_compress_ps(__mmask16(lanes), a));
  return __builtin_popcount(lanes);
}
struct FixedSum { __m512i lo, hi; int64_t num; };
inline FixedSum no_mass() { return {_mm512_setzero_si512(), _mm512_setzero_si512(), 0}; }
inline FixedSum add_mass(FixedSum s, F32x16 w, uint32_t lanes) {
  const __m512d point = _mm512_set1_pd(kFixedPoint);
  const __m512d lo = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(w)), point);
  const __m512d hi = _mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1)), point);
  return {_mm512_mask_add_epi64(s.lo, __mmask8(lanes), s.lo, _mm512_castpd_si512(lo)),
          _mm512_mask_add_epi64(s.hi, __mmask8(lanes >> 8), s.hi, _mm512_castpd_si512(hi)),
          s.num + __builtin_popcount(lanes)};
}
inline FixedSum add_mass(FixedSum s, F32x16 w) { return add_mass(s, w, 0xffff); }
inline FixedSum add_mass_ge(FixedSum s, F32x16 a, F32x16 b, F32x16 w) { return add_mass(s, w, lanes_ge(a, b)); }
inline uint64_t reduce_mass(FixedSum s) {
  return uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(s.lo, s.hi))) - uint64_t(s.num) * kFixedPointBits;
}
inline float reduce_add(F32x16 a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a); }
// A butterfly: each step folds two vectors into one, halving what a vector's own lanes still have to give.
template <class Fold>
inline F32x16 fold_rows(const F32x16 (&v)[16], Fold fold) {
  F32x16 quads[4];
  for (int i = 0; i < 4; ++i) {
    const F32x16 *r = v + 4 * i;
    const F32x16 a = fold(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const F32x16 b = fold(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    quads[i] = fold(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));  // r0 r1 r2 r3 in each 128 bits
  }
  const auto halves = [&](F32x16 a, F32x16 b) {
    return fold(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
}
inline F32x16 add_rows(const F32x16 (&v)[16]) {
  return fold_rows(v, [](F32x16 a, F32x16 b) { return add(a, b); });
}
inline F32x16 larger_magnitude(F32x16 a, F32x16 b) {
  const __m512i m = _mm512_set1_epi32(0x7fffffff);  // as integers, magnitudes are in order and NaNs above infinity
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), m),
                                              _mm512_and_si512(_mm512_castps_si512(b), m)));
}
inline F32x16 larger_rows(const F32x16 (&v)[16]) {
  return fold_rows(v, [](F32x16 a, F32x16 b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  });
}
inline F32x16 evens(F32x16 a, F32x16 b) {
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), b);
}
inline F32x16 odds(F32x16 a, F32x16 b) {
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1), b);
}
inline F32x16 round_nearest(F32x16 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// p * 2^n, and exactly 0 for x < -126 (scalef handles the infinities).
inline F32x16 scale_by_pow2(F32x16 p, F32x16 n, F32x16 x) {
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
  const __mmask16 huge = _mm512_cmp_ps_mask(x, _mm512_set1_ps(128.0f), _CMP_GE_OQ);
  const F32x16 r = _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), huge, _mm512_set1_ps(__builtin_inff()));
  return _mm512_maskz_mov_ps(_knot_mask16(tiny), r);
}

// Holds a value that several instructions use in a register: GCC would repeat the load for each of them, and Zen 4
// loads only one 512-bit vector a cycle.
inline F32x16 in_register(F32x16 a) {
  asm("" : "+v"(a));
  return a;
}
inline I32x16 in_register(I32x16 a) {
  asm("" : "+v"(a));
  return a;
}
inline Bf16x32 in_register(Bf16x32 a) {
  asm("" : "+v"(a.v));
  return a;
}
inline U8x64 in_register(U8x64 a) {
  asm("" : "+v"(a.v));
  return a;
}

// 2^x = 2^floor(x) * p(x - floor(x)); p is the minimax polynomial of degree 5 with p(0) = 1 (error 8e-8). Both
// instructions take the floor themselves; for -inf the fraction is 0 and the result 0. Half the instructions of exp2.
inline F32x16 exp2_weight(F32x16 x) {
  const F32x16 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F32x16 p = set1(1.86713005e-3f);
  p = fma(p, f, set1(9.01703071e-3f));
  p = fma(p, f, set1(5.57999127e-2f));
  p = fma(p, f, set1(2.40164444e-1f));
  p = fma(p, f, set1(6.93151295e-1f));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}

inline Bf16x32 load_bf16x32(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Bf16x32 set1_bf16_pair(uint32_t a) { return {_mm512_set1_epi32(int(a))}; }
inline Bf16x32 cvt_bf16x32(F32x16 lo, F32x16 hi) {
#if defined(__AVX512BF16__)
  return {(__m512i)_mm512_cvtne2ps_pbh(hi, lo)};
#else
  return {_mm512_inserti64x4(_mm512_castsi256_si512(bf16_bits(lo)), bf16_bits(hi), 1)};
#endif
}
inline Bf16x32 bf16_pairs(F32x16 first, F32x16 second) {
#if defined(__AVX512BF16__)
  constexpr int kStep = 0x00010001;  // words i of the low and of the high half, in turn
  const __m512i turn = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(iota(), _mm512_set1_epi32(kStep)));
  return {_mm512_permutexvar_epi16(turn, cvt_bf16x32(first, second).v)};
#else
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits(second)), 16);
  return {_mm512_or_si512(_mm512_cvtepu16_epi32(bf16_bits(first)), high)};
#endif
}
inline void store_bf16x32(void* p, Bf16x32 a) { _mm512_storeu_si512(p, a.v); }
inline F32x16 dot_bf16(F32x16 acc, Bf16x32 a, Bf16x32 b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)a.v, (__m512bh)b.v);
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
  const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                                    _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)));
  return _mm512_add_ps(acc, _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, high)),
                                            _mm512_castsi512_ps(_mm512_and_si512(b.v, high)), even));
#endif
}

inline U8x64 load_u8x64(const void* p) { return {_mm512_loadu_si512(p)}; }
inline U8x64 and_0f(U8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
inline U8x64 shift_right_4(U8x64 a) { return and_0f({_mm512_srli_epi16(a.v, 4)}); }
inline I32x16 izero() { return _mm512_setzero_si512(); }
inline I32x16 set1_int(int32_t a) { return _mm512_set1_epi32(a); }
inline void store_u8x64(void* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
inline I32x16 dot_u8s8(I32x16 acc, U8x64 a, int32_t b4) {
  const __m512i b = _mm512_set1_epi32(b4);
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, a.v, b);
#else
  // Exact in 16-bit pairs: u8 x s8 products may saturate vpmaddubsw, so even and odd bytes go apart.
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, _mm512_set1_epi16(0xff)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srai_epi16(b, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
}
#if defined(__AVX512VNNI__)
using Nibbles = I32x16;
inline Nibbles begin_u4(I32x16 start) { return start; }
inline Nibbles dot_u4s8(Nibbles acc, U8x64 a, int32_t b4) { return dot_u8s8(acc, a, b4); }
inline I32x16 end_u4(Nibbles acc, I32x16) { return acc; }
#else
// 8 steps of two products of at most 15 * 127 fit 16 bits.
struct Nibbles { __m512i v; };
inline Nibbles begin_u4(I32x16) { return {_mm512_setzero_si512()}; }
inline Nibbles dot_u4s8(Nibbles acc, U8x64 a, int32_t b4) {
  return {_mm512_add_epi16(acc.v, _mm512_maddubs_epi16(a.v, _mm512_set1_epi32(b4)))};
}
inline I32x16 end_u4(Nibbles acc, I32x16 start) {
  return _mm512_add_epi32(start, _mm512_madd_epi16(acc.v, _mm512_set1_epi16(1)));
}
#endif
inline F32x16 to_float(I32x16 a) { return _mm512_cvtepi32_ps(a); }
inline I32x16 to_int(F32x16 a) { return _mm512_cvtps_epi32(a); }
inline void store_low_bytes(int8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(a)));
}
inline void store_s8(int8_t* p, I32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline void store_digits(int8_t* high, int8_t* low, I32x16 a) {
  store_s8(high, _mm512_srai_epi32(a, 7));
  store_s8(low, _mm512_and_si512(a, _mm512_set1_epi32(127)));
}
// The magnitudes of e4m3 as bfloat16.
struct E4m3Table {
  alignas(64) uint16_t at[128];
  constexpr E4m3Table() : at() {
    for (int n = 8; n < 127; ++n) at[n] = uint16_t((n << 4) + (120 << 7));
    for (int n = 1; n < 8; ++n) {  // subnormals: n 2^-9
      const int high = n >= 4 ? 2 : n >= 2 ? 1 : 0;
      at[n] = uint16_t(((118 + high) << 7) + ((n << (7 - high)) & 0x7f));
    }
    at[127] = 0x7fff;
  }
};
inline constexpr E4m3Table kE4m3;

// Looked up: a word of two registers by the low six bits of the code, and one of two such words by the next bit.
template <int kPair>
inline Bf16x32 e4m3_pairs(U8x64 a) {
  constexpr int kBytes = 0x01010000 + 2 * kPair * 0x01010101, kLane = 0x04040404;
  const __m512i twice = _mm512_broadcast_i32x4(_mm_setr_epi32(kBytes, kBytes + kLane, kBytes + 2 * kLane, kBytes + 3 * kLane));
  const auto table = [](int i) { return _mm512_load_si512(kE4m3.at + 32 * i); };
  const __m512i codes = _mm512_shuffle_epi8(a.v, twice);  // twice in each word: once for the sign
  const __m512i low = _mm512_permutex2var_epi16(table(0), codes, table(1));
  const __m512i high = _mm512_permutex2var_epi16(table(2), codes, table(3));
  const __m512i magnitudes = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40)), low, high);
  return {_mm512_ternarylogic_epi32(magnitudes, codes, _mm512_set1_epi16(int16_t(0x8000)), 0xd8)};
}
template <int kByte>
inline F32x16 byte_minus(U8x64 a, int n) {  // a byte in the low bits of 2^23 is a float
  const __m512i shifted = kByte == 0 ? a.v : _mm512_srli_epi32(a.v, 8 * kByte);
  const __m512i bits = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4b000000), 0xea);
  return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(8388608.0f + float(n)));
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
