// cp.async.bulk: copies of any multiple of 16 bytes by the copy engine, issued by one thread.
// PTX ISA 9.7.9.25.4, sm_90. Twin: tests/simt/include/cuda/ptx/bulk.cuh.
//
// Addresses are multiples of 16. The engine works through the async proxy: shared memory written by ordinary
// stores needs fence_proxy_async (mbarrier.cuh) and a barrier before a store reads it.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Global to shared memory; completes `bytes` on `bar`, whose wait orders the data.
__device__ __forceinline__ void cp_async_bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(unsigned(__cvta_generic_to_shared(dst))), "l"(__cvta_generic_to_global(src)), "r"(bytes),
               "r"(unsigned(__cvta_generic_to_shared(bar))) : "memory");
}
// Shared to global memory; belongs to this thread's next bulk group.
__device__ __forceinline__ void cp_async_bulk_store(void* dst, const void* src, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(__cvta_generic_to_global(dst)), "r"(unsigned(__cvta_generic_to_shared(src))), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most kPending of this thread's groups are still to be written.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// As above, but they may still be written: their shared memory has been read, and may be used again.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace tilestream::ptx
