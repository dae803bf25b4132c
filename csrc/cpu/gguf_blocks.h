// GGUF block formats, decoded 32 consecutive weights at a time.
//
// A quantised group is codes q[32] with (scale, zero) per half of 16: value = q * scale + zero, in float32
// exactly what the format defines. Layouts as ggml writes them (little-endian):
//   Q4_0: d (q - 8): 18 bytes, 32 weights: f16 d; 16 bytes, low nibbles k 0..15, high nibbles k 16..31.
//   Q4_1: d q + m: 20 bytes, 32 weights: f16 d, f16 m; nibbles as Q4_0.
//   Q8_0: d q: 34 bytes, 32 weights: f16 d; 32 x int8.
//   Q4_K: d s q - dmin m: 144 bytes, 256 weights: f16 d, f16 dmin; 12 bytes of 6-bit scales s and mins m of 8
//         groups of 32; 128 bytes: 32 bytes hold two groups, low nibbles the first.
//   Q5_K: d s q - dmin m: 176 bytes, 256 weights: as Q4_K, with 32 bytes before the nibbles: bit g of byte k
//         is the fifth bit of weight k of group g.
//   Q6_K: d s (q - 32): 210 bytes, 256 weights: 128 bytes of low nibbles, 64 bytes of high bit pairs,
//         16 x int8 scales s of groups of 16, f16 d. Each half of 128 weights is 4 groups of 32: nibbles in
//         its bytes 0..31 low, 32..63 low, 0..31 high, 32..63 high; bit pairs 0..3 of its 32 bytes of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/vec.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

struct GroupCodes {
  uint8_t q[kGroupK];
  float scale[2], zero[2];  // of weights 0..15 and 16..31

  void set_all(float s, float z) {
    scale[0] = scale[1] = s;
    zero[0] = zero[1] = z;
  }
};

// float16 by bits, for one value (f16_to_float of vec.h converts 16).
inline float read_f16(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void split_nibbles(const uint8_t* bytes, uint8_t* q) {
  for (int i = 0; i < 16; ++i) q[i] = bytes[i] & 0x0f;
  for (int i = 0; i < 16; ++i) q[16 + i] = bytes[i] >> 4;
}

struct BlockQ4_0 {
  static constexpr int64_t kBytes = 18, kGroups = 1, kScalesPerGroup = 1;
  static void decode(const uint8_t* block, int64_t, GroupCodes& c) {
    const float d = read_f16(block);
    c.set_all(d, -8.0f * d);
    split_nibbles(block + 2, c.q);
  }
};

struct BlockQ4_1 {
  static constexpr int64_t kBytes = 20, kGroups = 1, kScalesPerGroup = 1;
  static void decode(const uint8_t* block, int64_t, GroupCodes& c) {
    c.set_all(read_f16(block), read_f16(block + 2));
    split_nibbles(block + 4, c.q);
  }
};

struct BlockQ8_0 {
  static constexpr int64_t kBytes = 34, kGroups = 1, kScalesPerGroup = 1;
  static void decode(const uint8_t* block, int64_t, GroupCodes& c) {
    const float d = read_f16(block);
    c.set_all(d, -128.0f * d);
    for (int i = 0; i < kGroupK; ++i) c.q[i] = block[2 + i] ^ 0x80;  // int8 + 128
  }
};

// Scale and minimum of group g of a Q4_K or Q5_K block. Groups 0..3 lie in the low 6 bits of bytes 0..3
// (scales) and 4..7 (mins); groups 4..7 have their low 4 bits in bytes 8..11 and their high 2 bits in the top
// of bytes 0..7.
inline void set_k_scales(const uint8_t* block, int64_t g, GroupCodes& c) {
  const uint8_t* s = block + 4;
  int scale = s[g & 3] & 63, minimum = s[4 + (g & 3)] & 63;
  if (g >= 4) {
    scale = (s[4 + g] & 15) | (s[g - 4] >> 6 << 4);
    minimum = (s[4 + g] >> 4) | (s[g] >> 6 << 4);
  }
  c.set_all(read_f16(block) * float(scale), -(read_f16(block + 2) * float(minimum)));
}

struct BlockQ4_K {
  static constexpr int64_t kBytes = 144, kGroups = 8, kScalesPerGroup = 1;
  static void decode(const uint8_t* block, int64_t g, GroupCodes& c) {
    set_k_scales(block, g, c);
    const uint8_t* nibbles = block + 16 + g / 2 * 32;
    const int shift = int(g & 1) * 4;
    for (int i = 0; i < kGroupK; ++i) c.q[i] = (nibbles[i] >> shift) & 0x0f;
  }
};

struct BlockQ5_K {
  static constexpr int64_t kBytes = 176, kGroups = 8, kScalesPerGroup = 1;
  static void decode(const uint8_t* block, int64_t g, GroupCodes& c) {
    set_k_scales(block, g, c);
    const uint8_t* high = block + 16;
    const uint8_t* nibbles = block + 48 + g / 2 * 32;
    const int shift = int(g & 1) * 4, bit = int(g);
    for (int i = 0; i < kGroupK; ++i)
      c.q[i] = uint8_t(((nibbles[i] >> shift) & 0x0f) | ((high[i] >> bit) & 1) << 4);
  }
};

struct BlockQ6_K {
  static constexpr int64_t kBytes = 210, kGroups = 8, kScalesPerGroup = 2;
  static void decode(const uint8_t* block, int64_t g, GroupCodes& c) {
    const int64_t half = g / 4, quarter = g % 4;
    const uint8_t* low = block + half * 64 + (quarter & 1) * 32;
    const uint8_t* high = block + 128 + half * 32;
    const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * g;
    const float d = read_f16(block + 208);
    for (int h = 0; h < 2; ++h) {
      c.scale[h] = d * float(scales[h]);
      c.zero[h] = -32.0f * c.scale[h];
    }
    const int low_shift = int(quarter / 2) * 4, high_shift = int(quarter) * 2;
    for (int i = 0; i < kGroupK; ++i) {
      c.q[i] = uint8_t(((low[i] >> low_shift) & 0x0f) | ((high[i] >> high_shift) & 3) << 4);
    }
  }
};

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
