// elect.sync: one lane of the warp, the same each time, which need not be lane 0. PTX ISA 9.7.13.14, sm_90.
// Twin: tests/simt/include/cuda/ptx/elect.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Every lane calls; true for one of them. Orders no memory. The compiler then knows that one thread goes on.
__device__ __forceinline__ bool elect_sync() {
  unsigned elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

}  // namespace tilestream::ptx
