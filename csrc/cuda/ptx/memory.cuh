// Scoped loads, stores and reductions on global memory: how blocks (gpu) and ranks (sys) wait for each other.
// PTX ISA 9.7.9.8 (ld), 9.7.9.12 (st), 9.7.13.4 (fence), 9.7.13.5 (atom), 9.7.13.6 (red), sm_70. Twin:
// tests/simt/include/cuda/ptx/memory.cuh.
//
// What a thread did before a release is seen by whoever acquires the value it wrote; for the whole block put
// a __syncthreads before the release and one behind the acquire. "memory" keeps the compiler from moving
// accesses across.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

__device__ __forceinline__ unsigned ld_acquire_gpu(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ unsigned ld_acquire_sys(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Orders nothing.
__device__ __forceinline__ unsigned ld_relaxed_sys(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_release_gpu(unsigned* p, unsigned v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void st_release_sys(unsigned* p, unsigned v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned atom_add_acq_rel_gpu(unsigned* p, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
__device__ __forceinline__ unsigned atom_add_acq_rel_sys(unsigned* p, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}
// Writes v if p holds `compare`; what it held.
__device__ __forceinline__ unsigned atom_cas_acq_rel_gpu(unsigned* p, unsigned compare, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before) : "l"(p), "r"(compare), "r"(v) : "memory");
  return before;
}
__device__ __forceinline__ unsigned atom_cas_acq_rel_sys(unsigned* p, unsigned compare, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.sys.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before) : "l"(p), "r"(compare), "r"(v) : "memory");
  return before;
}
__device__ __forceinline__ void red_add_release_gpu(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void red_add_release_sys(unsigned* p, unsigned v) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Orders this thread's accesses before it against those behind it, as seen by the GPU's or the system's
// threads: for many relaxed accesses between one pair of them.
__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Orders accesses to one place through different addresses of it, as multimem's is.
__device__ __forceinline__ void fence_proxy_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// 16 bytes that no other thread will read again: past L1.
__device__ __forceinline__ uint4 ld_nc_no_allocate(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace tilestream::ptx
