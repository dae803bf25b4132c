// Twin of csrc/cuda/ptx/wgmma.cuh.
#pragma once

#include "cuda/ptx/swizzle.cuh"
#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

enum class Major : int { kK = 0, kMN = 1 };

SIMT_TWIN uint64_t wgmma_descriptor(const void* tile, Swizzle swizzle, unsigned stride_bytes, unsigned leading_bytes = 0) {
  const unsigned address = simt::shared_address(tile);
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t((4 - int(swizzle)) & 3) << 62;
}
SIMT_TWIN uint64_t wgmma_advance(uint64_t descriptor, unsigned bytes) { return descriptor + (bytes >> 4); }

template <class... Arrays>
SIMT_TWIN void wgmma_fence(Arrays&...) { simt::wgmma_fence(); }
SIMT_TWIN void wgmma_commit_group() { simt::wgmma_commit_group(); }
template <int kPending, class... Arrays>
SIMT_TWIN void wgmma_wait_group(Arrays&... registers) { simt::wgmma_wait_group(kPending, {registers...}); }

#define SIMT_WGMMA(NAME, D, ELEMENT)                                                                                  \
  template <Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kNum>                                           \
  SIMT_TWIN void NAME(D (&d)[kNum], uint64_t a, uint64_t b, bool accumulate) {                                        \
    simt::wgmma({#NAME, simt::Element::ELEMENT, kNum, kMajorA == Major::kMN, kMajorB == Major::kMN, d, nullptr, a, b, \
                 accumulate});                                                                                        \
  }                                                                                                                   \
  template <Major kMajorB = Major::kK, int kNum>                                                                      \
  SIMT_TWIN void NAME(D (&d)[kNum], const unsigned (&a)[4], uint64_t b, bool accumulate) {                            \
    simt::wgmma({#NAME, simt::Element::ELEMENT, kNum, false, kMajorB == Major::kMN, d, a, 0, b, accumulate});         \
  }
SIMT_WGMMA(wgmma_m64k16_f16, float, kF16)
SIMT_WGMMA(wgmma_m64k16_bf16, float, kBF16)
SIMT_WGMMA(wgmma_m64k32_e4m3, float, kE4M3)
SIMT_WGMMA(wgmma_m64k32_s8, int, kS8)
#undef SIMT_WGMMA

}  // namespace tilestream::ptx
