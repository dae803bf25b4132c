// multimem: one access to the same place in the memory of all ranks, made by the NVLink switch.
// PTX ISA 9.7.9.14 (multimem), sm_90. Twin: tests/simt/include/cuda/ptx/multimem.cuh.
//
// Pointers are into the multicast mapping (cuMulticastCreate), never into a rank's own; plain accesses there
// are not allowed. 16 bytes each where no size is said, aligned. Relaxed among all ranks: a signal with
// release and acquire (below, memory.cuh) orders them, and fence_proxy_alias those through the multicast
// mapping against those through a rank's own. The order of a sum is the switch's own, but every rank that
// loads gets the same bits.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Whether the target has the instructions below; a branch of `if constexpr` on it keeps them out of older
// targets.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasMultimem = true;
#else
constexpr bool kHasMultimem = false;
#endif

// The sum over the ranks.
__device__ __forceinline__ float4 multimem_ld_reduce_add_f32(const void* p) {
  float4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
// Eight halves: summed in float, rounded once.
__device__ __forceinline__ uint4 multimem_ld_reduce_add_f16x2(const void* p) {
  uint4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 multimem_ld_reduce_add_bf16x2(const void* p) {
  uint4 v;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// The same 16 bytes, whatever they are, to every rank.
__device__ __forceinline__ void multimem_st(void* p, uint4 v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)), "f"(__uint_as_float(v.z)),
                 "f"(__uint_as_float(v.w)) : "memory");
}
__device__ __forceinline__ void multimem_st_b64(void* p, uint2 v) {
  asm volatile("multimem.st.relaxed.sys.global.v2.f32 [%0], {%1, %2};"
               ::"l"(p), "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)) : "memory");
}
__device__ __forceinline__ void multimem_st_b32(void* p, unsigned v) {
  asm volatile("multimem.st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Adds to every rank's.
__device__ __forceinline__ void multimem_red_add_f32(void* p, float4 v) {
  asm volatile("multimem.red.relaxed.sys.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void multimem_red_add_f16x2(void* p, uint4 v) {
  asm volatile("multimem.red.relaxed.sys.global.add.v4.f16x2 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void multimem_red_add_bf16x2(void* p, uint4 v) {
  asm volatile("multimem.red.relaxed.sys.global.add.v4.bf16x2 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// A signal to every rank: what this thread did before is seen by those that acquire the value.
__device__ __forceinline__ void multimem_red_add_release_sys(unsigned* p, unsigned v) {
  asm volatile("multimem.red.release.sys.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

}  // namespace tilestream::ptx
