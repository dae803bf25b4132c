// Twin of csrc/cuda/ptx/tensor_map.cuh.
#pragma once

#include "cuda/ptx/tensor_dims.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

using TensorMap = simt::TensorMap;

inline TensorMap make_tensor_map(const void* base, int element_bytes, std::initializer_list<TensorDim> dims, Swizzle swizzle) {
  check_tensor_map(base, element_bytes, dims, swizzle);
  TensorMap map{};
  map.base = static_cast<char*>(const_cast<void*>(base));
  map.element_bytes = element_bytes;
  map.swizzle_mask = swizzle_bytes(swizzle) - 16;
  for (const TensorDim& dim : dims) {
    map.size[map.rank] = dim.size, map.stride[map.rank] = dim.stride_bytes, map.box[map.rank] = int(dim.box);
    ++map.rank;
  }
  return map;
}

SIMT_TWIN void prefetch_tensormap(const TensorMap&) {}

template <int kRank>
SIMT_TWIN void cp_async_bulk_tensor_load(void* dst, const TensorMap& map, const int (&c)[kRank], uint64_t* bar) {
  simt::tensor_load("cp.async.bulk.tensor", dst, map, c, kRank, bar, 1u << simt::self().cluster_rank);
}
template <int kRank>
SIMT_TWIN void cp_async_bulk_tensor_load_multicast(void* dst, const TensorMap& map, const int (&c)[kRank], uint64_t* bar,
                                                   unsigned short ranks) {
  simt::tensor_load("cp.async.bulk.tensor.multicast", dst, map, c, kRank, bar, ranks);
}
template <int kRank>
SIMT_TWIN void cp_async_bulk_tensor_store(const TensorMap& map, const int (&c)[kRank], const void* src) {
  simt::tensor_store("cp.async.bulk.tensor", map, c, kRank, src);
}

}  // namespace tilestream::ptx
