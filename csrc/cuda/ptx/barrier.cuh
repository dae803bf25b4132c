// Named barriers of a block: producers and consumers that are not the whole block. PTX ISA 9.7.13.1, sm_70.
// Twin: tests/simt/include/cuda/ptx/barrier.cuh.
//
// num_threads is a multiple of 32 and counts both those that sync and those that only arrive; id 0 is __syncthreads'.
// Memory accesses before an arrival are ordered before those behind a sync of the same phase.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

__device__ __forceinline__ void bar_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

}  // namespace tilestream::ptx
