// AVX2 + FMA + F16C form of vec.h: two 256-bit halves.
#pragma once

#include <immintrin.h>

namespace tilestream::cpu::TILESTREAM_LEVEL {

struct F32x16 { __m256 lo, hi; };
struct I32x16 { __m256i lo, hi; };
struct Bf16x32 { __m256i lo, hi; };
struct U8x64 { __m256i lo, hi; };

inline __m256i loadi(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F32x16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F32x16 zero() { return set1(0.0f); }
inline I32x16 iota() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline I32x16 less(I32x16 a, int n) {
  const __m256i bound = _mm256_set1_epi32(n);
  return {_mm256_cmpgt_epi32(bound, a.lo), _mm256_cmpgt_epi32(bound, a.hi)};
}
inline F32x16 load_first(const float* p, int n) {
  const I32x16 m = less(iota(), n);
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
inline void store_first(float* p, F32x16 a, int n) {
  const I32x16 m = less(iota(), n);
  _mm256_maskstore_ps(p, m.lo, a.lo);
  _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}

inline __m256 bf16_to_ps(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F32x16 load_bf16(const uint16_t* p) { return {bf16_to_ps(load128(p)), bf16_to_ps(load128(p + 8))}; }
inline F32x16 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
inline F32x16 f16_of_u32(__m256i a, __m256i b) {
  const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
inline void load_f16_pairs(const uint16_t* p, F32x16& first, F32x16& second) {
  const __m256i a = loadi(p), b = loadi(p + 16), low = _mm256_set1_epi32(0xffff);
  first = f16_of_u32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
  second = f16_of_u32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
}
inline F32x16 load_u8(const uint8_t* p) {
  const __m128i b = load128(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}
inline F32x16 load_s8(const int8_t* p) {
  const __m128i b = load128(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
inline __m128i bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
inline void store_bf16(uint16_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_bits(a.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), bf16_bits(a.hi));
}
inline void store_f16(uint16_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 abs(F32x16 a) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}
inline F32x16 where_ge(F32x16 a, F32x16 b, F32x16 yes) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), yes.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ), yes.hi)};
}
inline uint32_t lanes_ge(F32x16 a, F32x16 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)) |
                  _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8);
}
inline int store_lanes(float* p, F32x16 a, uint32_t lanes) {
  float all[16];
  store(all, a);
  int n = 0;
  for (; lanes != 0; lanes &= lanes - 1) p[n++] = all[__builtin_ctz(lanes)];
  return n;
}
struct FixedSum { __m256i v[4]; int64_t num; };
inline FixedSum no_mass() { return {}; }
inline FixedSum add_mass(FixedSum s, F32x16 w) {
  const __m128 quarters[4] = {_mm256_castps256_ps128(w.lo), _mm256_extractf128_ps(w.lo, 1),
                              _mm256_castps256_ps128(w.hi), _mm256_extractf128_ps(w.hi, 1)};
  for (int i = 0; i < 4; ++i) {
    const __m256d fixed = _mm256_add_pd(_mm256_cvtps_pd(quarters[i]), _mm256_set1_pd(kFixedPoint));
    s.v[i] = _mm256_add_epi64(s.v[i], _mm256_castpd_si256(fixed));
  }
  s.num += 16;
  return s;
}
inline uint64_t reduce_mass(FixedSum s) {
  uint64_t lanes[16], sum = 0;
  std::memcpy(lanes, s.v, sizeof(lanes));
  for (uint64_t lane : lanes) sum += lane;
  return sum - uint64_t(s.num) * kFixedPointBits;
}
inline F32x16 where_lt(I32x16 a, int n, F32x16 yes, F32x16 no) {
  const I32x16 m = less(a, n);
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(m.lo)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(m.hi))};
}
inline float reduce_add(F32x16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float reduce_max(F32x16 a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline F32x16 add_rows(const F32x16 (&v)[16]) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = reduce_add(v[i]);
  return load(lanes);
}
inline __m256 larger_magnitude(__m256 a, __m256 b) {
  const __m256i m = _mm256_set1_epi32(0x7fffffff);  // as integers, magnitudes are in order and NaNs above infinity
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), m),
                                              _mm256_and_si256(_mm256_castps_si256(b), m)));
}
inline F32x16 larger_magnitude(F32x16 a, F32x16 b) {
  return {larger_magnitude(a.lo, b.lo), larger_magnitude(a.hi, b.hi)};
}
inline F32x16 larger_rows(const F32x16 (&v)[16]) {
  int32_t lanes[16];
  for (int i = 0; i < 16; ++i) {
    const __m256i m = _mm256_castps_si256(larger_magnitude(v[i].lo, v[i].hi));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    lanes[i] = _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
  }
  float out[16];
  std::memcpy(out, lanes, sizeof(out));
  return load(out);
}
template <int kPick>  // of each 128 bits, two of either
inline __m256 every_second(F32x16 a) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a.lo, a.hi, kPick)), 0xd8));
}
inline F32x16 evens(F32x16 a, F32x16 b) { return {every_second<0x88>(a), every_second<0x88>(b)}; }
inline F32x16 odds(F32x16 a, F32x16 b) { return {every_second<0xdd>(a), every_second<0xdd>(b)}; }
inline F32x16 round_nearest(F32x16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline __m256 scale_by_pow2(__m256 p, __m256 n, __m256 x) {
  const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  __m256 r = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e));
  r = _mm256_blendv_ps(r, _mm256_set1_ps(__builtin_inff()), _mm256_cmp_ps(x, _mm256_set1_ps(127.5f), _CMP_GE_OQ));
  r = _mm256_blendv_ps(r, _mm256_setzero_ps(), _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ));
  return _mm256_blendv_ps(r, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline F32x16 scale_by_pow2(F32x16 p, F32x16 n, F32x16 x) {
  return {scale_by_pow2(p.lo, n.lo, x.lo), scale_by_pow2(p.hi, n.hi, x.hi)};
}

inline Bf16x32 load_bf16x32(const void* p) {
  return {loadi(p), loadi(static_cast<const char*>(p) + 32)};
}
inline Bf16x32 set1_bf16_pair(uint32_t a) { return {_mm256_set1_epi32(int(a)), _mm256_set1_epi32(int(a))}; }
inline Bf16x32 cvt_bf16x32(F32x16 lo, F32x16 hi) {
  return {_mm256_set_m128i(bf16_bits(lo.hi), bf16_bits(lo.lo)), _mm256_set_m128i(bf16_bits(hi.hi), bf16_bits(hi.lo))};
}
inline Bf16x32 bf16_pairs(F32x16 first, F32x16 second) {
  const auto half = [](__m256 a, __m256 b) {
    const __m128i low = bf16_bits(a), high = bf16_bits(b);
    return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
  };
  return {half(first.lo, second.lo), half(first.hi, second.hi)};
}
inline void store_bf16x32(void* p, Bf16x32 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, a.hi);
}
inline __m256 dot_bf16(__m256 acc, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  const __m256 even = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
  return _mm256_add_ps(acc, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, high)),
                                            _mm256_castsi256_ps(_mm256_and_si256(b, high)), even));
}
inline F32x16 dot_bf16(F32x16 acc, Bf16x32 a, Bf16x32 b) {
  return {dot_bf16(acc.lo, a.lo, b.lo), dot_bf16(acc.hi, a.hi, b.hi)};
}

inline U8x64 load_u8x64(const void* p) { return {loadi(p), loadi(static_cast<const char*>(p) + 32)}; }
inline U8x64 and_0f(U8x64 a) {
  const __m256i m = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline U8x64 shift_right_4(U8x64 a) { return and_0f({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)}); }
inline I32x16 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32x16 set1_int(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline void store_u8x64(void* p, U8x64 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, a.hi);
}
// Exact in 16-bit pairs: u8 x s8 products may saturate vpmaddubsw, so even and odd bytes go apart.
inline __m256i dot_u8s8(__m256i acc, __m256i a, __m256i b_even, __m256i b_odd) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), b_even);
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), b_odd)));
}
inline I32x16 dot_u8s8(I32x16 acc, U8x64 a, int32_t b4) {
  const __m256i b = _mm256_set1_epi32(b4);
  const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
  return {dot_u8s8(acc.lo, a.lo, b_even, b_odd), dot_u8s8(acc.hi, a.hi, b_even, b_odd)};
}
// 8 steps of two products of at most 15 * 127 fit 16 bits.
struct Nibbles { __m256i lo, hi; };
inline Nibbles begin_u4(I32x16) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Nibbles dot_u4s8(Nibbles acc, U8x64 a, int32_t b4) {
  const __m256i b = _mm256_set1_epi32(b4);
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(a.lo, b)), _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(a.hi, b))};
}
inline I32x16 end_u4(Nibbles acc, I32x16 start) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(start.lo, _mm256_madd_epi16(acc.lo, ones)),
          _mm256_add_epi32(start.hi, _mm256_madd_epi16(acc.hi, ones))};
}
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32x16 to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline void store_low_bytes(int8_t* p, F32x16 a) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(_mm256_castps_si256(a.lo), byte),
                                                                 _mm256_and_si256(_mm256_castps_si256(a.hi), byte)), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
inline void store_s8(int8_t* p, I32x16 a) {
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
inline void store_digits(int8_t* high, int8_t* low, I32x16 a) {
  const __m256i m = _mm256_set1_epi32(127);
  store_s8(high, {_mm256_srai_epi32(a.lo, 7), _mm256_srai_epi32(a.hi, 7)});
  store_s8(low, {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)});
}
// Exponent and mantissa shifted into place, 120 added to the exponent. A table holds what has to be flipped for codes 0 to 7,
// low bytes first: of the others vpshufb sees an index with its highest bit set, and gives 0.
template <int kPair>
inline __m256i e4m3_pairs(__m256i a) {
  constexpr int kBytes = 0x01010000 + 2 * kPair * 0x01010101, kLane = 0x04040404;
  const __m128i twice = _mm_setr_epi32(kBytes, kBytes + kLane, kBytes + 2 * kLane, kBytes + 3 * kLane);
  const __m128i flips = _mm_setr_epi8(0, 0x10, char(0xa0), char(0xf0), 0x40, 0x70, 0x20, 0x10, 0x3c, 7, 7, 7, 0, 0, 0, 0);
  const __m256i codes = _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(twice));
  const __m256i magnitudes = _mm256_slli_epi16(codes, 9);
  const __m256i normal = _mm256_add_epi16(_mm256_srli_epi16(magnitudes, 5), _mm256_set1_epi16(120 << 7));
  const __m256i above_7 = _mm256_add_epi8(_mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(0x78));
  const __m256i index = _mm256_xor_si256(above_7, _mm256_set1_epi16(8));
  const __m256i flipped = _mm256_xor_si256(normal, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(flips), index));
  const __m256i nan = _mm256_cmpeq_epi16(magnitudes, _mm256_set1_epi16(int16_t(0xfe00)));
  const __m256i sign = _mm256_and_si256(codes, _mm256_set1_epi16(int16_t(0x8000)));
  return _mm256_or_si256(_mm256_or_si256(flipped, nan), sign);
}
template <int kPair>
inline Bf16x32 e4m3_pairs(U8x64 a) { return {e4m3_pairs<kPair>(a.lo), e4m3_pairs<kPair>(a.hi)}; }
template <int kByte>
inline __m256 byte_minus(__m256i a, int n) {  // a byte in the low bits of 2^23 is a float
  const __m256i byte = _mm256_and_si256(_mm256_srli_epi32(a, 8 * kByte), _mm256_set1_epi32(0xff));
  const __m256i bits = _mm256_or_si256(byte, _mm256_set1_epi32(0x4b000000));
  return _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(8388608.0f + float(n)));
}
template <int kByte>
inline F32x16 byte_minus(U8x64 a, int n) { return {byte_minus<kByte>(a.lo, n), byte_minus<kByte>(a.hi, n)}; }

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
