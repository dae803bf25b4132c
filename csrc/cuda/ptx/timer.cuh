// The GPU's clock. PTX ISA 10 (special registers, %globaltimer), sm_30. Twin: tests/simt/include/cuda/ptx/timer.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Nanoseconds since some time in the past; it advances in steps of up to a microsecond.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

}  // namespace tilestream::ptx
