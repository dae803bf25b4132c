// The orthogonal Hadamard matrix of kScaleK, on spans of a row.
#pragma once

#include "cpu/elements.h"
#include "tilestream/quantise.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// k elements of x, a multiple of kScaleK, into `out`: sums and differences of elements whose indices differ in one bit, for
// each bit. Taking two vectors apart into their evens and odds makes the lowest of their elements' five bits the highest, so
// after five rounds all five have had their turn and stand in order again.
template <class E>
inline void hadamard_row(const typename E::Storage* x, int64_t k, float* out) {
  static_assert(kScaleK == 128);
  constexpr int kVecs = kScaleK / 16;
  const F32x16 scale = set1(0.088388347648318447f);  // 1 / sqrt(kScaleK)
  const auto sum_and_difference = [](F32x16& a, F32x16& b, F32x16 first, F32x16 second) {
    a = add(first, second), b = sub(first, second);
  };
  for (int64_t begin = 0; begin < k; begin += kScaleK) {
    F32x16 y[kVecs];
    for (int v = 0; v < kVecs; ++v) y[v] = E::load(x + begin + 16 * v);
    for (int v = 0; v < kVecs; v += 2) {
      F32x16 &a = y[v], &b = y[v + 1];
      for (int bit = 0; bit < 5; ++bit) sum_and_difference(a, b, evens(a, b), odds(a, b));
    }
    for (int distance = 2; distance < kVecs; distance *= 2) {
      for (int v = 0; v < kVecs; ++v) {
        if ((v & distance) == 0) sum_and_difference(y[v], y[v + distance], y[v], y[v + distance]);
      }
    }
    for (int v = 0; v < kVecs; ++v) store(out + begin + 16 * v, mul(y[v], scale));
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
