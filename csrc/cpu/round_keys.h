// 4-bit codes of one head's keys, rounded with feedback (AppendKvParams::key_feedback): 16 tokens at a time, a lane each.
//
// An element waits for the errors of all before it. Blocks of 8 positions of the order stay in registers while they take the
// errors of earlier blocks, so a lane's sums are made in the order of the header.
// Cost: head_dim^2 / 2 FMAs for 16 tokens, and a chain of head_dim roundings, which is what a lone token pays too (head_dim 64
// on a Zen 4 core: 1.5 to 2 us a head for any 1 to 16 tokens).
#pragma once

#include "cpu/simd/vec.h"
#include "tilestream/types.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

constexpr int kMaxKeyDim = 256;

// One head's part of AppendKvParams.
struct HeadRounding {
  const float* offset;
  const int32_t* order;
  const float* feedback;
  int head_dim;
};

// What kv_scales holds of a row: value = code * scale + zero. A `check` of NaN makes scale NaN.
struct RowScale {
  uint16_t scale, zero;  // float16
  RowScale() = default;
  RowScale(float low, float high, float check, int most)
      : scale(float_to_f16((high - low) / float(most) + check)), zero(float_to_f16(low)) {}
  float divisor() const { return f16_to_float(scale) > 0.0f ? f16_to_float(scale) : 1.0f; }
};

// keys: rows of 16 tokens, those of fewer followed by anything finite. Overwrites codes [16][head_dim].
inline void round_keys(const HeadRounding& head, const float (&keys)[16][kMaxKeyDim], uint8_t* codes, RowScale* scales) {
  constexpr int kBlock = 8;
  const int n = head.head_dim;
  alignas(64) float x[kMaxKeyDim][16];  // in the order of rounding; what is rounded becomes its negated error
  F32x16 low = set1(INFINITY), high = set1(-INFINITY), check = zero();
  for (int i = 0; i < n; ++i) {
    const int c = head.order[i];
    for (int lane = 0; lane < 16; ++lane) x[i][lane] = keys[lane][c] - head.offset[c];
    low = min(load(x[i]), low);
    high = max(load(x[i]), high);
    check = fma(load(x[i]), zero(), check);
  }
  alignas(64) float lows[16], highs[16], checks[16], scale_of[16], zero_of[16], divisor_of[16];
  store(lows, low), store(highs, high), store(checks, check);
  for (int lane = 0; lane < 16; ++lane) {
    scales[lane] = RowScale(lows[lane] + 0.0f, highs[lane], checks[lane], 15);  // -0 becomes 0
    scale_of[lane] = f16_to_float(scales[lane].scale);
    zero_of[lane] = f16_to_float(scales[lane].zero);
    divisor_of[lane] = scales[lane].divisor();
  }
  const F32x16 scale = load(scale_of), least = load(zero_of), divisor = load(divisor_of), magic = set1(kRoundingMagic);
  for (int begin = 0; begin < n; begin += kBlock) {
    F32x16 block[kBlock];
    for (int j = 0; j < kBlock; ++j) block[j] = load(x[begin + j]);
    const float* feedback = head.feedback + begin;
    for (int i = 0; i < begin; ++i, feedback += n) {
      const F32x16 error = load(x[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) block[j] = fma(error, set1(feedback[j]), block[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i, feedback += n) {
      // NaN is the first operand: both min and max then give the second.
      const F32x16 steps = max(min(div(sub(block[i], least), divisor), set1(15.0f)), zero());
      const F32x16 code = add(steps, magic);
      const F32x16 error = sub(fma(sub(code, magic), scale, least), block[i]);
      store(x[begin + i], error);
#pragma GCC unroll 8
      for (int j = i + 1; j < kBlock; ++j) block[j] = fma(error, set1(feedback[j]), block[j]);
      int8_t column[16];
      store_low_bytes(column, code);
      uint8_t* to = codes + head.order[begin + i];
      for (int lane = 0; lane < 16; ++lane) to[lane * n] = uint8_t(column[lane]);
    }
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
