// Clusters: blocks that run together, share a barrier and reach each other's shared memory.
// PTX ISA 9.7.13.3 (barrier.cluster), 9.7.9.23 (mapa), sm_90. Twin: tests/simt/include/cuda/ptx/cluster.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

__device__ __forceinline__ unsigned cluster_ctarank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster arrives, then waits. Release and acquire: accesses before the arrival, to distributed shared
// memory too, are ordered before those behind the wait. No block may end while others still access its shared memory.
__device__ __forceinline__ void barrier_cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same place in shared memory of block `rank`; plain loads and stores reach it.
template <class T>
__device__ __forceinline__ T* mapa(T* p, unsigned rank) {
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

}  // namespace tilestream::ptx
