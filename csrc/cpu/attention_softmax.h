// Between the two products: logits, masks, and one online-softmax step in base 2 over a tile of keys.
//
// A row's step is the same arithmetic whatever other rows are in the call. A tile in which a row sees no key leaves
// the row's state as it was: its weights are exactly 0, the factor on the old state is exactly 1 (or the state is 0).
#pragma once

#include <cfloat>
#include <type_traits>

#include "cpu/attention_tile.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// What turns a product q . k into a base-2 logit: s * scale, or cap * tanh(s * cap_scale), plus ALiBi.
struct LogitRule {
  float scale;      // to base 2; positive. With a cap it multiplies the tanh.
  float cap_scale;  // 0: no soft cap
  bool alibi;
  // What still multiplies a logit that logit() has seen, to take it to base 2.
  float to_log2() const { return alibi ? 1.0f : scale; }
};

// The keys lo <= j < hi of the tile that a row sees, and what ALiBi adds: slope * (j + first_distance), in base 2.
struct RowView {
  int lo, hi;
  float alibi_slope, first_distance;
};

// Running state of a job's rows.
struct SoftmaxState {
  float* max;  // [rows], to be multiplied by LogitRule::to_log2()
  float* sum;  // [rows][16]: one partial sum of weights per lane
};

inline F32x16 infinite() { return set1(-__builtin_inff()); }

inline F32x16 mask(F32x16 s, int lo, int hi) {
  const I32x16 lanes = iota();
  return where_lt(lanes, lo, infinite(), where_lt(lanes, hi, s, infinite()));
}

// Near 0 the Taylor series (next term below 2e-8 at 0.35); elsewhere by exp, where 1 - t cancels nothing.
inline F32x16 tanh(F32x16 x) {
  const F32x16 one = set1(1.0f), two = set1(2.0f);
  x = max(set1(-16.0f), min(set1(16.0f), x));  // tanh(16) rounds to 1; in this operand order NaN stays
  const F32x16 a = abs(x);
  const F32x16 e = exp2(mul(a, set1(2.0f * kLog2E)));
  const F32x16 big = sub(one, div(two, add(e, one)));
  const F32x16 z = mul(a, a);
  F32x16 t = set1(-1382.0f / 155925.0f);
  t = fma(t, z, set1(62.0f / 2835.0f));
  t = fma(t, z, set1(-17.0f / 315.0f));
  t = fma(t, z, set1(2.0f / 15.0f));
  t = fma(t, z, set1(-1.0f / 3.0f));
  const F32x16 small = fma(mul(t, z), a, a);
  const F32x16 magnitude = where_lt(to_int(mul(a, set1(0.5f / 0.35f))), 1, small, big);
  // The sign of x: +1, -1 or (for 0, whose tanh is 0) anything finite.
  return mul(magnitude, div(x, max(set1(FLT_MIN), abs(x))));
}

inline F32x16 logit(F32x16 s, const LogitRule& rule, const RowView& row, int key) {
  if (rule.cap_scale != 0.0f) s = tanh(mul(s, set1(rule.cap_scale)));
  if (!rule.alibi) return s;
  const F32x16 distance = add(to_float(iota()), set1(float(key) + row.first_distance));
  return fma(s, set1(rule.scale), mul(set1(row.alibi_slope), distance));
}

// Largest logit of the row in this tile, before to_log2(); masked and transformed scores are written back.
inline float row_max(float* scores, const LogitRule& rule, const RowView& row) {
  F32x16 s[kTileBlocks];
  const bool plain = rule.cap_scale == 0.0f && !rule.alibi;
  const bool whole = row.lo <= 0 && row.hi >= kTileKeys;
  for (int b = 0; b < kTileBlocks; ++b) s[b] = load(scores + 16 * b);
  if (!plain || !whole) {
    for (int b = 0; b < kTileBlocks; ++b) {
      if (!plain) s[b] = logit(s[b], rule, row, 16 * b);
      if (!whole) s[b] = mask(s[b], row.lo - 16 * b, row.hi - 16 * b);
      store(scores + 16 * b, s[b]);
    }
  }
  for (int half = kTileBlocks / 2; half > 0; half /= 2) {
    for (int b = 0; b < half; ++b) s[b] = max(s[b], s[b + half]);
  }
  return reduce_max(s[0]);
}

// Weights exp2(logit - max) of scores [rows][kTileKeys]: pairs for products in bfloat16, else in place.
// alpha[r] (16 floats): the factor on what row r has accumulated so far.
template <class C>
__attribute__((noinline)) void softmax_step(int rows, float* scores, const LogitRule& rule, const RowView* views,
                                            SoftmaxState state, float* alpha, uint32_t* pairs) {
  const F32x16 scale = set1(rule.to_log2());
  float lanes[16] = {};
  for (int r = 0; r < rows; ++r) lanes[r] = row_max(scores + r * kTileKeys, rule, views[r]);
  const F32x16 old_max = load_first(state.max, rows);
  const F32x16 new_max = max(old_max, load(lanes));
  store_first(state.max, new_max, rows);
  // A row that has seen nothing has max = -inf; subtracting a finite number instead keeps its weights 0, not NaN.
  const F32x16 finite_max = max(set1(-FLT_MAX), new_max);
  store(lanes, finite_max);
  store(alpha, exp2_weight(mul(sub(old_max, finite_max), scale)));
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * kTileKeys;
    const F32x16 largest = set1(lanes[r]);
    // Scaled after the subtraction: what rounds is then a distance, small where the weight is large.
    F32x16 w[kTileBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kTileBlocks; ++b) w[b] = exp2_weight(mul(sub(load(s + 16 * b), largest), scale));
    if constexpr (std::is_base_of_v<BFloat16Product, C>) {
#pragma GCC unroll 4
      for (int b = 0; b < kTileBlocks; b += 2) {
        store_bf16x32(pairs + r * num_units<C>(kTileKeys) + 8 * b, cvt_bf16x32(w[b], w[b + 1]));
      }
    } else {
#pragma GCC unroll 8
      for (int b = 0; b < kTileBlocks; ++b) store(s + 16 * b, w[b]);
    }
#pragma GCC unroll 8
    for (int b = 1; b < kTileBlocks; ++b) w[0] = add(w[0], w[b]);
    store(state.sum + 16 * r, fma(load(state.sum + 16 * r), set1(alpha[r]), w[0]));
  }
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
