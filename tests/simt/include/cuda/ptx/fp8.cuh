// Twin of csrc/cuda/ptx/fp8.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

constexpr bool kHasCvtE4m3 = true;

SIMT_TWIN unsigned short cvt_e4m3x2(float low, float high) {
  return (unsigned short)(simt::narrow_e4m3(low) | simt::narrow_e4m3(high) << 8);
}
SIMT_TWIN unsigned cvt_f16x2_e4m3x2(unsigned short a) {
  return simt::narrow<5, 10>(simt::widen_e4m3(a & 0xff)) | simt::narrow<5, 10>(simt::widen_e4m3(a >> 8)) << 16;
}

}  // namespace tilestream::ptx
