// mbarrier: a barrier object in shared memory that counts arrivals and bytes of asynchronous copies.
// PTX ISA 9.7.13.15, sm_90 for what is here. Twin: tests/simt/include/cuda/ptx/mbarrier.cuh.
//
// A phase completes when `count` threads have arrived and every expected byte has come; the next begins at once. Waiting
// names the parity of a phase: 0 for the first, 1 for the second, and so on. Before the first phase has completed, parity 1
// counts as completed, so a producer that waits for an empty stage begins with parity 1.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// One thread, once; then fence_mbarrier_init and a barrier before anybody uses it. 8-byte aligned.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(bar))), "r"(count) : "memory");
}
// Makes inits visible to the cluster and to the copy engine (async proxy). PTX ISA 9.7.13.4.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders this thread's shared-memory accesses before those that TMA and wgmma make after it: by every thread that wrote,
// before the barrier. PTX ISA 9.7.13.4.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Release: what this thread did before is seen by those whose wait this completes.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(unsigned(__cvta_generic_to_shared(bar))) : "memory");
}
// As arrive, and the phase also waits for `bytes` more of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
               ::"r"(unsigned(__cvta_generic_to_shared(bar))), "r"(bytes) : "memory");
}
// At the barrier at the same place in block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* bar, unsigned rank) {
  asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }"
               ::"r"(unsigned(__cvta_generic_to_shared(bar))), "r"(rank) : "memory");
}

// Arrives when every cp.async (cp_async.cuh) that this thread has issued so far has written. The barrier's count includes it.
// The consumer's wait then orders the data; the producer waits for nothing.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
               ::"r"(unsigned(__cvta_generic_to_shared(bar))) : "memory");
}

// Whether the phase of this parity has completed; may wait a while before it says no. Acquire, when yes, of what this block
// and the copy engine did.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint64_t* bar, unsigned parity) {
  unsigned done;
  asm volatile(
      "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
      : "=r"(done)
      : "r"(unsigned(__cvta_generic_to_shared(bar))), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* bar, unsigned parity) {
  while (!mbarrier_try_wait_parity(bar, parity)) {
  }
}
// The same question, answered at once.
__device__ __forceinline__ bool mbarrier_test_wait_parity(uint64_t* bar, unsigned parity) {
  unsigned done;
  asm volatile(
      "{ .reg .pred done; mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
      : "=r"(done)
      : "r"(unsigned(__cvta_generic_to_shared(bar))), "r"(parity)
      : "memory");
  return done != 0;
}
// As mbarrier_try_wait_parity, and of what other blocks of the cluster did before they arrived; costs the multiprocessor its L1.
__device__ __forceinline__ bool mbarrier_try_wait_parity_cluster(uint64_t* bar, unsigned parity) {
  unsigned done;
  asm volatile(
      "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
      : "=r"(done)
      : "r"(unsigned(__cvta_generic_to_shared(bar))), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait_parity_cluster(uint64_t* bar, unsigned parity) {
  while (!mbarrier_try_wait_parity_cluster(bar, parity)) {
  }
}

}  // namespace tilestream::ptx
