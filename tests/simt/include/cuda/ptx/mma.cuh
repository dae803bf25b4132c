// Twin of csrc/cuda/ptx/mma.cuh. Products are exact, summed in double (or int) and rounded once: a tensor core's own
// order and truncation are not documented.
#pragma once

#include "cuda/runtime.cuh"

namespace simt {

// Element formats: `kBits` wide; value() of the low bits.
struct F16 { static constexpr int kBits = 16; using Sum = double; static double value(unsigned b) { return widen<5, 10>(b); } };
struct BF16 { static constexpr int kBits = 16; using Sum = double; static double value(unsigned b) { return widen<8, 7>(b); } };
struct E4M3 { static constexpr int kBits = 8; using Sum = double; static double value(unsigned b) { return widen_e4m3(b); } };
struct S8 { static constexpr int kBits = 8; using Sum = int; static int value(unsigned b) { return (signed char)b; } };
struct U8 { static constexpr int kBits = 8; using Sum = int; static int value(unsigned b) { return int(b & 255); } };
struct S4 { static constexpr int kBits = 4; using Sum = int; static int value(unsigned b) { return int(b << 28) >> 28; } };
struct U4 { static constexpr int kBits = 4; using Sum = int; static int value(unsigned b) { return int(b & 15); } };

template <class D>
struct MmaLane {
  D* d;
  const unsigned *a, *b;
};

template <class A, class B, class D>
void mma_m16n8(LaneArguments lanes) {
  constexpr int kPerRegister = 32 / A::kBits, kDepth = 8 * kPerRegister;
  constexpr unsigned kMask = (1u << A::kBits) - 1;
  typename A::Sum a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MmaLane<D>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kPerRegister; ++e) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][kPerRegister * (t + 4 * (i / 2)) + e] = A::value(mine.a[i] >> A::kBits * e & kMask);
      for (int i = 0; i < 2; ++i) b[g][kPerRegister * (t + 4 * i) + e] = B::value(mine.b[i] >> B::kBits * e & kMask);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    D* d = static_cast<MmaLane<D>*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      typename A::Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
      d[i] = D(d[i] + sum);
    }
  }
}

}  // namespace simt

namespace tilestream::ptx {

#define SIMT_MMA(NAME, A, B, D)                                                                 \
  SIMT_TWIN void NAME(D (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {              \
    simt::MmaLane<D> mine{d, a, b};                                                             \
    simt::warp_collective(#NAME, simt::kFullMask, &mine, simt::mma_m16n8<simt::A, simt::B, D>); \
  }
SIMT_MMA(mma_m16n8k16_f16, F16, F16, float)
SIMT_MMA(mma_m16n8k16_bf16, BF16, BF16, float)
SIMT_MMA(mma_m16n8k32_s8, S8, S8, int)
SIMT_MMA(mma_m16n8k32_u8s8, U8, S8, int)
SIMT_MMA(mma_m16n8k64_s4, S4, S4, int)
SIMT_MMA(mma_m16n8k64_u4s4, U4, S4, int)
SIMT_MMA(mma_m16n8k32_e4m3, E4M3, E4M3, float)
#undef SIMT_MMA

}  // namespace tilestream::ptx
