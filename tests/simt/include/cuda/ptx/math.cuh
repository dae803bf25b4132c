// Twin of csrc/cuda/ptx/math.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

SIMT_TWIN float ex2_approx(float x) { return float(std::exp2(double(x))); }

template <int kTable>
SIMT_TWIN unsigned lop3(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int i = 0; i < 32; ++i) d |= unsigned(kTable >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
  return d;
}
SIMT_TWIN unsigned prmt(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }
SIMT_TWIN unsigned cvt_bf16x2(float low, float high) { return simt::narrow<8, 7>(low) | simt::narrow<8, 7>(high) << 16; }
SIMT_TWIN unsigned cvt_f16x2(float low, float high) { return simt::narrow<5, 10>(low) | simt::narrow<5, 10>(high) << 16; }
SIMT_TWIN unsigned opaque(unsigned x) { return x; }

}  // namespace tilestream::ptx
