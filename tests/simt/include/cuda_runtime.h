// The part of CUDA's language and run-time that kernels here use, on a host. Found before the toolkit's by the include path.
//
// There is no __shared__: all shared memory is dynamic_smem<T>() of cuda/runtime.cuh.
#pragma once

#include <algorithm>
#include <cmath>

#include "simt/twin.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (::simt::self().thread)
#define blockIdx (::simt::self().block)
#define blockDim (::simt::self().block_dim)
#define gridDim (::simt::self().grid_dim)
constexpr int warpSize = 32;

#include "simt/atomics.h"
#include "simt/math.h"
#include "simt/warp.h"

SIMT_TWIN void __syncthreads() { simt::barrier_sync("__syncthreads", 0, 0); }
SIMT_TWIN int __syncthreads_count(int p) { return simt::barrier_sync("__syncthreads_count", 0, 0, simt::Reduce::kCount, p); }
SIMT_TWIN int __syncthreads_and(int p) { return simt::barrier_sync("__syncthreads_and", 0, 0, simt::Reduce::kAnd, p); }
SIMT_TWIN int __syncthreads_or(int p) { return simt::barrier_sync("__syncthreads_or", 0, 0, simt::Reduce::kOr, p); }

// The emulator's memory is sequentially consistent; its search for races wants the fences.
SIMT_TWIN void __threadfence_block() {}
SIMT_TWIN void __threadfence() { simt::fence(); }
SIMT_TWIN void __threadfence_system() { simt::fence(), __atomic_thread_fence(__ATOMIC_SEQ_CST); }
SIMT_TWIN void __nanosleep(unsigned) { simt::poll("__nanosleep"); }

template <class T>
SIMT_TWIN T __ldg(const T* p) { return *p; }
template <class T>
SIMT_TWIN T __ldcs(const T* p) { return *p; }
template <class T>
SIMT_TWIN T __ldcg(const T* p) { return *p; }
template <class T>
SIMT_TWIN void __stcs(T* p, T v) { *p = v; }
template <class T>
SIMT_TWIN void __stcg(T* p, T v) { *p = v; }
