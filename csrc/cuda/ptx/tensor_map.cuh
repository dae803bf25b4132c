// TMA: copies of boxes of a tensor with up to 5 dimensions by the copy engine, issued by one thread.
// PTX ISA 9.7.9.27.1 (cp.async.bulk.tensor), sm_90. Twin: tests/simt/include/cuda/ptx/tensor_map.cuh.
//
// The kernel's parameter is `const __grid_constant__ TensorMap`, or a struct with one. Coordinates are of the
// box's first element, innermost dimension first; they may lie outside the tensor: loads give zeros there,
// stores write nothing. In shared memory a box is contiguous, innermost dimension fastest, 128-byte aligned
// (8 rows with a swizzle), its chunks of 16 bytes where `swizzled` of swizzle.cuh says. The engine works
// through the async proxy: see fence_proxy_async in mbarrier.cuh.
#pragma once

#include <cuda.h>

#include "cuda/ptx/tensor_dims.cuh"

namespace tilestream::ptx {

using TensorMap = CUtensorMap;

// Host. `dims` from the innermost outwards. The driver's function is looked up at run time: nothing links
// libcuda.
inline TensorMap make_tensor_map(const void* base, int element_bytes, std::initializer_list<TensorDim> dims,
                                 Swizzle swizzle) {
  check_tensor_map(base, element_bytes, dims, swizzle);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const char* name = "cuTensorMapEncodeTiled";
    cuda::check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) throw std::runtime_error("tensor maps need a driver of CUDA 12.0 or newer");

  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5] = {1, 1, 1, 1, 1};
  int rank = 0;
  for (const TensorDim& dim : dims) {
    sizes[rank] = dim.size, strides[rank] = dim.stride_bytes, box[rank] = dim.box;
    ++rank;
  }
  const CUtensorMapDataType type = element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  TensorMap map;
  const CUresult error = encode(&map, type, rank, const_cast<void*>(base), sizes, strides + 1, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: " + std::to_string(error));
  return map;
}
static_assert(CU_TENSOR_MAP_SWIZZLE_32B == int(Swizzle::k32));
static_assert(CU_TENSOR_MAP_SWIZZLE_64B == int(Swizzle::k64));
static_assert(CU_TENSOR_MAP_SWIZZLE_128B == int(Swizzle::k128));

// Fetches the map itself, some time before its first use.
__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One instruction for each rank; operands 0 to 3 are the form's own, 4 to 8 the coordinates (repeated, and
// unused, past the rank).
#define TILESTREAM_TENSOR(RANK, COORDINATES, QUALIFIERS, FRONT, BACK, ...)                                   \
  if constexpr (kRank == RANK)                                                                               \
    asm volatile("cp.async.bulk.tensor." #RANK "d." QUALIFIERS " " FRONT COORDINATES "]" BACK ";"            \
                 ::__VA_ARGS__,                                                                              \
                 "r"(c[0]), "r"(c[1 % kRank]), "r"(c[2 % kRank]), "r"(c[3 % kRank]), "r"(c[4 % kRank])       \
                 : "memory");
#define TILESTREAM_TENSOR_RANKS(...)                                                                         \
  TILESTREAM_TENSOR(1, "{%4}", __VA_ARGS__)                                                                  \
  TILESTREAM_TENSOR(2, "{%4, %5}", __VA_ARGS__)                                                              \
  TILESTREAM_TENSOR(3, "{%4, %5, %6}", __VA_ARGS__)                                                          \
  TILESTREAM_TENSOR(4, "{%4, %5, %6, %7}", __VA_ARGS__)                                                      \
  TILESTREAM_TENSOR(5, "{%4, %5, %6, %7, %8}", __VA_ARGS__)

// Global to shared memory; completes the bytes of the whole box on `bar`, whose wait orders the data.
template <int kRank>
__device__ __forceinline__ void cp_async_bulk_tensor_load(void* dst, const TensorMap& map,
                                                          const int (&c)[kRank], uint64_t* bar) {
  TILESTREAM_TENSOR_RANKS("shared::cluster.global.tile.mbarrier::complete_tx::bytes", "[%0], [%1, ", ", [%2]",
                          "r"(unsigned(__cvta_generic_to_shared(dst))), "l"(&map),
                          "r"(unsigned(__cvta_generic_to_shared(bar))), "n"(0))
}
// To every block of the cluster whose bit in `ranks` is set, at the place of dst in each; completes on the
// barrier at the place of `bar` in each. Every one of them has to expect the bytes.
template <int kRank>
__device__ __forceinline__ void cp_async_bulk_tensor_load_multicast(void* dst, const TensorMap& map,
                                                                    const int (&c)[kRank], uint64_t* bar,
                                                                    unsigned short ranks) {
  TILESTREAM_TENSOR_RANKS("shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster",
                          "[%0], [%1, ", ", [%2], %3",
                          "r"(unsigned(__cvta_generic_to_shared(dst))), "l"(&map),
                          "r"(unsigned(__cvta_generic_to_shared(bar))), "h"(ranks))
}
// Shared to global memory; belongs to this thread's next bulk group (bulk.cuh).
template <int kRank>
__device__ __forceinline__ void cp_async_bulk_tensor_store(const TensorMap& map, const int (&c)[kRank],
                                                           const void* src) {
  TILESTREAM_TENSOR_RANKS("global.shared::cta.tile.bulk_group", "[%1, ", ", [%0]",
                          "r"(unsigned(__cvta_generic_to_shared(src))), "l"(&map), "n"(0), "n"(0))
}
#undef TILESTREAM_TENSOR_RANKS
#undef TILESTREAM_TENSOR

}  // namespace tilestream::ptx
