// Portable form of vec.h: four 128-bit GCC/Clang vectors, which compile to SSE2 on x86-64 and NEON on arm64.
#pragma once

#include <cmath>

namespace tilestream::cpu::TILESTREAM_LEVEL {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct F32x16 { f32x4 v[4]; };
struct I32x16 { i32x4 v[4]; };
struct Bf16x32 { uint16_t v[32]; };
struct U8x64 { uint8_t v[64]; };

#define TILESTREAM_LANES(expr)             \
  F32x16 r;                                \
  for (int i = 0; i < 4; ++i) r.v[i] = (expr); \
  return r

inline F32x16 load(const float* p) {
  F32x16 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void store(float* p, F32x16 a) { std::memcpy(p, &a, sizeof(a)); }
inline F32x16 set1(float a) { TILESTREAM_LANES((f32x4{a, a, a, a})); }
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load_first(const float* p, int n) {
  F32x16 r = zero();
  std::memcpy(&r, p, size_t(n) * 4);
  return r;
}
inline void store_first(float* p, F32x16 a, int n) { std::memcpy(p, &a, size_t(n) * 4); }
inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

template <class Get>
inline F32x16 make(Get get) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = get(i);
  return load(lanes);
}
inline F32x16 load_bf16(const uint16_t* p) {
  return make([&](int i) { return bits_to_float(uint32_t(p[i]) << 16); });
}
// float16 by bits: shift into place, rescale by 2^112; the exponent of infinities and NaNs is patched.
inline F32x16 load_f16(const uint16_t* p) {
  return make([&](int i) {
    const uint32_t h = p[i], sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
    const float scaled = bits_to_float(rest) * 0x1p112f;
    const uint32_t bits = float_to_bits(scaled) | ((h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    return bits_to_float(sign | bits);
  });
}
inline void load_f16_pairs(const uint16_t* p, F32x16& first, F32x16& second) {
  uint16_t halves[2][16];
  for (int i = 0; i < 32; ++i) halves[i % 2][i / 2] = p[i];
  first = load_f16(halves[0]);
  second = load_f16(halves[1]);
}
inline F32x16 load_u8(const uint8_t* p) { return make([&](int i) { return float(p[i]); }); }
inline F32x16 load_s8(const int8_t* p) { return make([&](int i) { return float(p[i]); }); }
inline uint16_t round_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t round_to_f16(float f) {
  const uint32_t bits = float_to_bits(f), sign = (bits >> 16) & 0x8000u;
  uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 2^16 or more
  if (a < 0x38800000u) {                                  // a float16 denormal: let the adder round
    return uint16_t(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((a + 0xfff + ((a >> 13) & 1) - 0x38000000u) >> 13));
}
inline void store_bf16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = round_to_bf16(a.v[i / 4][i % 4]);
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = round_to_f16(a.v[i / 4][i % 4]);
}

inline F32x16 add(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] + b.v[i]); }
inline F32x16 sub(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] - b.v[i]); }
inline F32x16 mul(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] * b.v[i]); }
inline F32x16 div(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] / b.v[i]); }
inline F32x16 max(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32x16 min(F32x16 a, F32x16 b) { TILESTREAM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
#if defined(__aarch64__)
  F32x16 r;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) r.v[i][j] = __builtin_fmaf(a.v[i][j], b.v[i][j], c.v[i][j]);
  return r;
#else
  TILESTREAM_LANES(a.v[i] * b.v[i] + c.v[i]);
#endif
}
inline F32x16 abs(F32x16 a) { TILESTREAM_LANES((f32x4)((i32x4)a.v[i] & 0x7fffffff)); }
inline I32x16 iota() {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = i;
  return r;
}
inline F32x16 where_ge(F32x16 a, F32x16 b, F32x16 yes) {
  TILESTREAM_LANES((f32x4)((a.v[i] >= b.v[i]) & (i32x4)yes.v[i]));
}
inline uint32_t lanes_ge(F32x16 a, F32x16 b) {
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= uint32_t(a.v[i / 4][i % 4] >= b.v[i / 4][i % 4]) << i;
  return lanes;
}
inline int store_lanes(float* p, F32x16 a, uint32_t lanes) {
  int n = 0;
  for (; lanes != 0; lanes &= lanes - 1) {
    const int i = __builtin_ctz(lanes);
    p[n++] = a.v[i / 4][i % 4];
  }
  return n;
}
struct FixedSum { uint64_t v[16]; int64_t num; };
inline FixedSum no_mass() { return {}; }
inline FixedSum add_mass(FixedSum s, F32x16 w) {
  for (int i = 0; i < 16; ++i) {
    const double fixed = double(w.v[i / 4][i % 4]) + kFixedPoint;
    uint64_t bits;
    std::memcpy(&bits, &fixed, 8);
    s.v[i] += bits;
  }
  s.num += 16;
  return s;
}
inline uint64_t reduce_mass(FixedSum s) {
  uint64_t sum = 0;
  for (uint64_t lane : s.v) sum += lane;
  return sum - uint64_t(s.num) * kFixedPointBits;
}
inline F32x16 where_lt(I32x16 a, int n, F32x16 yes, F32x16 no) { TILESTREAM_LANES(a.v[i] < n ? yes.v[i] : no.v[i]); }
inline float reduce_add(F32x16 a) {
  const f32x4 s = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float reduce_max(F32x16 a) {
  float m = a.v[0][0];
  for (int i = 1; i < 16; ++i) m = a.v[i / 4][i % 4] > m ? a.v[i / 4][i % 4] : m;
  return m;
}
inline F32x16 add_rows(const F32x16 (&v)[16]) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = reduce_add(v[i]);
  return load(lanes);
}
// As integers, magnitudes are in order and NaNs above infinity.
inline F32x16 larger_magnitude(F32x16 a, F32x16 b) {
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    const i32x4 x = (i32x4)a.v[i] & 0x7fffffff, y = (i32x4)b.v[i] & 0x7fffffff;
    r.v[i] = (f32x4)(x > y ? x : y);
  }
  return r;
}
inline F32x16 larger_rows(const F32x16 (&v)[16]) {
  return make([&](int i) {
    int32_t lanes[16], largest = 0;
    std::memcpy(lanes, &v[i], sizeof(lanes));
    for (int32_t lane : lanes) largest = lane > largest ? lane : largest;
    return bits_to_float(uint32_t(largest));
  });
}
// Adding and subtracting 1.5 * 2^23 leaves the nearest integer (ties to even) for |a| < 2^22.
inline F32x16 evens(F32x16 a, F32x16 b) {
  return make([&](int i) { return i < 8 ? a.v[i / 2][i % 2 * 2] : b.v[i / 2 - 4][i % 2 * 2]; });
}
inline F32x16 odds(F32x16 a, F32x16 b) {
  return make([&](int i) { return i < 8 ? a.v[i / 2][i % 2 * 2 + 1] : b.v[i / 2 - 4][i % 2 * 2 + 1]; });
}
inline F32x16 round_nearest(F32x16 a) {
  const F32x16 magic = set1(12582912.0f), big = set1(4194304.0f), m = abs(a);
  TILESTREAM_LANES(m.v[i] < big.v[i] ? (a.v[i] + magic.v[i]) - magic.v[i] : a.v[i]);
}
inline I32x16 to_int(F32x16 a) {
  I32x16 r;
  const F32x16 n = round_nearest(a);
  for (int i = 0; i < 4; ++i) r.v[i] = __builtin_convertvector(n.v[i], i32x4);
  return r;
}
inline F32x16 to_float(I32x16 a) { TILESTREAM_LANES(__builtin_convertvector(a.v[i], f32x4)); }
inline F32x16 scale_by_pow2(F32x16 p, F32x16 n, F32x16 x) {
  const I32x16 e = to_int(max(min(n, set1(127.0f)), set1(-126.0f)));
  const f32x4 low = {-126.0f, -126.0f, -126.0f, -126.0f}, high = {127.5f, 127.5f, 127.5f, 127.5f};
  const float inf = __builtin_inff();
  const f32x4 none = {}, all = {inf, inf, inf, inf};
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    const f32x4 scaled = (f32x4)((i32x4)p.v[i] + (e.v[i] << 23));
    const f32x4 bounded = x.v[i] < low ? none : (x.v[i] >= high ? all : scaled);
    r.v[i] = x.v[i] == x.v[i] ? bounded : x.v[i];
  }
  return r;
}

inline Bf16x32 load_bf16x32(const void* p) {
  Bf16x32 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline Bf16x32 set1_bf16_pair(uint32_t a) {
  Bf16x32 r;
  for (int i = 0; i < 16; ++i) std::memcpy(r.v + 2 * i, &a, 4);
  return r;
}
inline Bf16x32 cvt_bf16x32(F32x16 lo, F32x16 hi) {
  Bf16x32 r;
  store_bf16(r.v, lo);
  store_bf16(r.v + 16, hi);
  return r;
}
inline Bf16x32 bf16_pairs(F32x16 first, F32x16 second) {
  Bf16x32 r;
  const Bf16x32 both = cvt_bf16x32(first, second);
  for (int i = 0; i < 32; ++i) r.v[i] = both.v[i / 2 + i % 2 * 16];
  return r;
}
inline void store_bf16x32(void* p, Bf16x32 a) { std::memcpy(p, &a, sizeof(a)); }
inline F32x16 dot_bf16(F32x16 acc, Bf16x32 a, Bf16x32 b) {
  const i32x4 high = {int(0xffff0000u), int(0xffff0000u), int(0xffff0000u), int(0xffff0000u)};
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    i32x4 ia, ib;
    std::memcpy(&ia, a.v + 8 * i, 16);
    std::memcpy(&ib, b.v + 8 * i, 16);
    r.v[i] = acc.v[i] + ((f32x4)(ia << 16) * (f32x4)(ib << 16) + (f32x4)(ia & high) * (f32x4)(ib & high));
  }
  return r;
}

inline U8x64 load_u8x64(const void* p) {
  U8x64 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline U8x64 and_0f(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] &= 0x0f;
  return a;
}
inline U8x64 shift_right_4(U8x64 a) {
  for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
  return a;
}
inline I32x16 izero() { return {}; }
inline I32x16 set1_int(int32_t a) {
  I32x16 r;
  for (int i = 0; i < 4; ++i) r.v[i] = i32x4{a, a, a, a};
  return r;
}
inline void store_u8x64(void* p, U8x64 a) { std::memcpy(p, &a, sizeof(a)); }
// Even and odd bytes apart: a product of u8 and s8 fits 16 bits, two of them are then widened and added.
inline I32x16 dot_u8s8(I32x16 acc, U8x64 a, int32_t b4) {
  typedef int16_t i16x8 __attribute__((vector_size(16)));
  const i32x4 words = {b4, b4, b4, b4};
  const i16x8 b_even = ((i16x8)words << 8) >> 8, b_odd = (i16x8)words >> 8;
  I32x16 r;
  for (int i = 0; i < 4; ++i) {
    i32x4 codes;
    std::memcpy(&codes, a.v + 16 * i, 16);
    const i32x4 even = (i32x4)((i16x8)(codes & 0x00ff00ff) * b_even);
    const i32x4 odd = (i32x4)((i16x8)((codes >> 8) & 0x00ff00ff) * b_odd);
    r.v[i] = acc.v[i] + (((even << 16) >> 16) + (even >> 16)) + (((odd << 16) >> 16) + (odd >> 16));
  }
  return r;
}
using Nibbles = I32x16;
inline Nibbles begin_u4(I32x16 start) { return start; }
inline Nibbles dot_u4s8(Nibbles acc, U8x64 a, int32_t b4) { return dot_u8s8(acc, a, b4); }
inline I32x16 end_u4(Nibbles acc, I32x16) { return acc; }
inline void store_low_bytes(int8_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(float_to_bits(a.v[i / 4][i % 4]));
}
inline void store_s8(int8_t* p, I32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i / 4][i % 4]);
}
inline void store_digits(int8_t* high, int8_t* low, I32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const int x = a.v[i / 4][i % 4];
    high[i] = int8_t(x >> 7);
    low[i] = int8_t(x & 127);
  }
}
// As load_e4m3() in vec.h. codes: one in the low byte of each lane.
inline i32x4 e4m3_bits(i32x4 codes) {
  const i32x4 magnitudes = codes & 0x7f;
  const f32x4 y = (f32x4)((magnitudes << 20) + (120 << 23)), subnormal = y + (y - 0x1p-6f);
  return (i32x4)(subnormal < y ? subnormal : y) | ((magnitudes == 0x7f) & 0x7fff0000) | (codes & 0x80) << 24;
}
template <int kPair>
inline Bf16x32 e4m3_pairs(U8x64 a) {
  Bf16x32 r;
  for (int i = 0; i < 4; ++i) {
    i32x4 quads;
    std::memcpy(&quads, a.v + 16 * i, 16);
    quads >>= 16 * kPair;
    const i32x4 first = e4m3_bits(quads), second = e4m3_bits(quads >> 8), lanes = ((first >> 16) & 0xffff) | second;
    std::memcpy(r.v + 8 * i, &lanes, 16);
  }
  return r;
}
template <int kByte>
inline F32x16 byte_minus(U8x64 a, int n) {
  F32x16 r;
  for (int i = 0; i < 4; ++i) {
    i32x4 lanes;
    std::memcpy(&lanes, a.v + 16 * i, 16);
    r.v[i] = __builtin_convertvector(((lanes >> (8 * kByte)) & 0xff) - n, f32x4);
  }
  return r;
}

#undef TILESTREAM_LANES

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
