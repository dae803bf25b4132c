// cp.async: copies of 4, 8 or 16 bytes from global to shared memory that do not pass through registers.
// PTX ISA 9.7.9.25.3, sm_80. Twin: tests/simt/include/cuda/ptx/cp_async.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Copies src_bytes (0 to kBytes) and fills the rest of kBytes with zeros; src is not read when src_bytes is 0.
// Both addresses are multiples of kBytes. Seen by this thread after its wait, by others after a barrier behind that.
// "memory": the compiler must not move accesses to dst or src across it.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* dst, const void* src, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const unsigned to = unsigned(__cvta_generic_to_shared(dst));
  const size_t from = __cvta_generic_to_global(src);
  if constexpr (kBytes == 16)  // .cg: past L1, which 16 bytes alone may
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(src_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(src_bytes) : "memory");
}

// This thread's copies since its last commit become one group.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Waits for every copy of this thread, committed or not.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace tilestream::ptx
