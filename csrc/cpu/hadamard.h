// The orthogonal Hadamard matrix of kScaleK, on spans of a row.
#pragma once

#include "cpu/elements.h"
#include "tilestream/quantise.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// Entry (i, j) of Sylvester's matrix: -1 to the number of bits that i and j share.
constexpr float hadamard_sign(int i, int j) { return __builtin_popcount(unsigned(i & j)) % 2 == 0 ? 1.0f : -1.0f; }

// Its first sixteen rows and columns, divided by sqrt(kScaleK).
struct HadamardRows {
  alignas(64) float at[16][16];
  constexpr HadamardRows() : at{} {
    static_assert(kScaleK == 128);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) at[i][j] = hadamard_sign(i, j) * 0.088388347648318447f;
    }
  }
};
inline constexpr HadamardRows kHadamardRows;

// k elements of x, a multiple of kScaleK, into `out`. Within sixteen lanes by products with the small matrix, among the
// eight vectors of a span by sums and differences: the large one is the Kronecker product of both.
template <class E>
inline void hadamard_row(const typename E::Storage* x, int64_t k, float* out) {
  constexpr int kVecs = kScaleK / 16;
  for (int64_t begin = 0; begin < k; begin += kScaleK) {
    alignas(64) float lanes[kScaleK];
    for (int v = 0; v < kVecs; ++v) store(lanes + 16 * v, E::load(x + begin + 16 * v));
    F32x16 y[kVecs];
    for (int v = 0; v < kVecs; ++v) y[v] = zero();
    for (int j = 0; j < 16; ++j) {
      const F32x16 signs = load(kHadamardRows.at[j]);
      for (int v = 0; v < kVecs; ++v) y[v] = fma(set1(lanes[16 * v + j]), signs, y[v]);
    }
    for (int distance = 1; distance < kVecs; distance *= 2) {
      for (int v = 0; v < kVecs; ++v) {
        if (v & distance) continue;
        const F32x16 first = y[v], second = y[v + distance];
        y[v] = add(first, second), y[v + distance] = sub(first, second);
      }
    }
    for (int v = 0; v < kVecs; ++v) store(out + begin + 16 * v, y[v]);
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
