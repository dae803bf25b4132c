// Twin of csrc/cuda/ptx/wgmma.cuh.
#pragma once

#include "cuda/ptx/swizzle.cuh"
#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

enum class Major : int { kK = 0, kMN = 1 };

SIMT_TWIN uint64_t wgmma_descriptor(const void* tile, Swizzle swizzle, unsigned stride_bytes,
                                    unsigned leading_bytes = 0) {
  const uint64_t leading = leading_bytes >> 4, stride = stride_bytes >> 4, layout = (4 - int(swizzle)) & 3;
  return (simt::shared_address(tile) & 0x3ffff) >> 4 | leading << 16 | stride << 32 | layout << 62;
}
SIMT_TWIN uint64_t wgmma_advance(uint64_t descriptor, unsigned bytes) { return descriptor + (bytes >> 4); }

template <class... Arrays>
SIMT_TWIN void wgmma_fence(Arrays&...) { simt::wgmma_fence(); }
SIMT_TWIN void wgmma_commit_group() { simt::wgmma_commit_group(); }
template <int kPending, class... Arrays>
SIMT_TWIN void wgmma_wait_group(Arrays&... registers) { simt::wgmma_wait_group(kPending, {registers...}); }

// The shapes of TILESTREAM_WGMMA_SHAPES, by registers of d.
constexpr bool wgmma_has(int num) {
  for (int n : {4, 8, 16, 32, 40, 48, 56, 64, 80, 88, 96, 128}) {
    if (n == num) return true;
  }
  return false;
}

#define SIMT_WGMMA(NAME, D, ELEMENT, BITS)                                                                   \
  template <Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kNum>                                  \
  SIMT_TWIN void NAME(D (&d)[kNum], uint64_t a, uint64_t b, bool accumulate) {                               \
    static_assert(wgmma_has(kNum) && (BITS == 16 || (kMajorA == Major::kK && kMajorB == Major::kK)));        \
    simt::wgmma({#NAME, simt::Element::ELEMENT, kNum, kMajorA == Major::kMN, kMajorB == Major::kMN, d,       \
                 nullptr, a, b, accumulate});                                                                \
  }                                                                                                          \
  template <Major kMajorB = Major::kK, int kNum>                                                             \
  SIMT_TWIN void NAME(D (&d)[kNum], const unsigned (&a)[4], uint64_t b, bool accumulate) {                   \
    static_assert(wgmma_has(kNum) && (BITS == 16 || kMajorB == Major::kK));                                  \
    simt::wgmma({#NAME, simt::Element::ELEMENT, kNum, false, kMajorB == Major::kMN, d, a, 0, b,              \
                 accumulate});                                                                               \
  }
SIMT_WGMMA(wgmma_m64k16_f16, float, kF16, 16)
SIMT_WGMMA(wgmma_m64k16_bf16, float, kBF16, 16)
SIMT_WGMMA(wgmma_m64k32_e4m3, float, kE4M3, 8)
SIMT_WGMMA(wgmma_m64k32_s8, int, kS8, 8)
#undef SIMT_WGMMA

}  // namespace tilestream::ptx
