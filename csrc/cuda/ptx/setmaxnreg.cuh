// setmaxnreg: moves registers from one warpgroup of a block to another. PTX ISA 9.7.19.5, sm_90a.
// Twin: tests/simt/include/cuda/ptx/setmaxnreg.cuh.
//
// All warps of a warpgroup together; 24 to 256 registers a thread, a multiple of 8. The kernel needs
// __launch_bounds__, whose share of the 64k registers each thread starts with: the sum over the warpgroups
// must not exceed that. dec does not wait; inc waits until others have given enough. Orders no memory.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace tilestream::ptx
