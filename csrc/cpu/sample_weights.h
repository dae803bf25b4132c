// What the draws of sample.cpp and shard_draw.cpp share: weights and their fixed-point masses, bits that order logits, the
// random number.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kLanes = 16;
constexpr float kLog2E = 1.44269504f;

// What logits weigh, and which of them the draw keeps.
struct Filter {
  float max;            // of the row
  float inverse_scale;  // log2(e) / temperature
  float threshold;      // the draw keeps logits from here on
  float least_weight;   // and of those, weights from here on (min-p)
};

// Kept away from 0 and infinity, whose products with the other are NaN.
inline float inverse_scale_of(float temperature) {
  return std::fmin(std::fmax(kLog2E / temperature, FLT_MIN), FLT_MAX / 64);
}

// Order-preserving bits; -0 and +0 are one value.
inline uint32_t ordered_bits(float x) {
  const float y = x + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

inline float from_ordered_bits(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- masses -------------------------------------------------------------------------------------

// exp((x - max) / temperature), in [0, 1].
inline F32x16 weights(const Filter& f, F32x16 x) {
  return exp2_weight(mul(sub(x, set1(f.max)), set1(f.inverse_scale)));
}

// 0 for those that the draw does not keep.
inline F32x16 kept_weights(const Filter& f, F32x16 x) {
  const F32x16 w = weights(f, x);
  return where_ge(w, set1(f.least_weight), where_ge(x, set1(f.threshold), w));
}

inline uint64_t fixed_point(float weight) {
  const double shifted = double(weight) + kFixedPoint;
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  return uint64_t(bits - kFixedPointBits);
}

// Kept masses of x[0 .. n), which -inf follows up to a multiple of 16, as do masses of 0; returns their sum.
uint64_t kept_masses(const Filter& f, const float* x, long n, uint64_t* mass) {
  uint64_t total = 0;
  for (long i = 0; i < n; i += kLanes) {
    float w[kLanes];
    store(w, kept_weights(f, load(x + i)));
    for (long j = 0; j < kLanes; ++j) mass[i + j] = fixed_point(w[j]);
    for (long j = 0; j < kLanes; ++j) total += mass[i + j];
  }
  return total;
}

// The least mass that reaches the fraction top_p of `total`.
uint64_t needed_mass(float top_p, uint64_t total) {
  const double need = std::ceil(double(top_p) * double(total));
  return need < 1.0 ? 1 : need < double(total) ? uint64_t(need) : total;
}

// ---- the random number --------------------------------------------------------------------------

// 64 random bits of Philox4x32-10 with key = seed, counter = position.
uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1,
                              uint32_t(a)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t(c[1]) << 32 | c[0];
}

// floor(u * total) for u = bits / 2^64.
uint64_t scaled_draw(uint64_t bits, uint64_t total) {
  return uint64_t((unsigned __int128)bits * total >> 64);
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
