// TMA of each rank. data[0..31], as integers: rank, element bytes, swizzle, blocks that get the box; 4..
// sizes, 9.. strides in bytes, 14.. box, 19.. coordinates. data[64..] is the tensor. Loads dump shared memory
// at data[16384..]; stores take it from there. test_tma.py has the formulas.
#include "cases.h"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace {

using namespace tilestream;

constexpr int kWords = 2048;  // of a box, at most

struct Storage {
  alignas(1024) unsigned box[kWords];
  uint64_t full;
};

template <int kRank>
struct Params {
  ptx::TensorMap map;
  int corner[kRank];
  unsigned bytes, ranks;
  unsigned* words;
};

template <int kRank>
__global__ void load_kernel(const __grid_constant__ Params<kRank> p) {
  Storage& s = cuda::dynamic_smem<Storage>();
  const unsigned rank = ptx::cluster_ctarank();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(p.map);
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    if (p.ranks >> rank & 1) ptx::mbarrier_arrive_expect_tx(&s.full, p.bytes);
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (threadIdx.x == 0 && rank == 0) {
    if (p.ranks == 1) ptx::cp_async_bulk_tensor_load(s.box, p.map, p.corner, &s.full);
    else ptx::cp_async_bulk_tensor_load_multicast(s.box, p.map, p.corner, &s.full, (unsigned short)p.ranks);
  }
  if (p.ranks >> rank & 1) {
    ptx::mbarrier_wait_parity(&s.full, 0);
    for (unsigned i = threadIdx.x; i < p.bytes / 4; i += 32) p.words[rank * kWords + i] = s.box[i];
  }
}

template <int kRank>
__global__ void store_kernel(const __grid_constant__ Params<kRank> p) {
  Storage& s = cuda::dynamic_smem<Storage>();
  for (unsigned i = threadIdx.x; i < p.bytes / 4; i += 32) s.box[i] = p.words[i];
  ptx::fence_proxy_async();
  __syncwarp();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_store(p.map, p.corner, s.box);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
    s.box[0] = 0;
    ptx::cp_async_bulk_wait_group<0>();
  }
}

// The tensor map of the numbers in `inputs`, of a tensor on the device at `data`.
template <int kRank, size_t... kDims>
Params<kRank> read_params(const float* inputs, float* data, std::index_sequence<kDims...>) {
  const auto* host = reinterpret_cast<const int*>(inputs);
  Params<kRank> p;
  p.map = ptx::make_tensor_map(
      data + 64, host[1], {ptx::TensorDim{uint64_t(host[4 + kDims]), uint64_t(host[9 + kDims]), unsigned(host[14 + kDims])}...},
      ptx::Swizzle(host[2]));
  p.bytes = host[1], p.ranks = host[3], p.words = reinterpret_cast<unsigned*>(data + 16384);
  for (int i = 0; i < kRank; ++i) p.corner[i] = host[19 + i], p.bytes *= host[14 + i];
  return p;
}

template <int kRank>
void load(float* data, const float* host) {
  const auto p = read_params<kRank>(host, data, std::make_index_sequence<kRank>());
  cuda::launch(load_kernel<kRank>, {.grid = 4, .block = 32, .smem_bytes = sizeof(Storage), .cluster = 4}, p);
}
template <int kRank>
void store(float* data, const float* host) {
  const auto p = read_params<kRank>(host, data, std::make_index_sequence<kRank>());
  cuda::launch(store_kernel<kRank>, {.grid = 1, .block = 32, .smem_bytes = sizeof(Storage)}, p);
}

const simt_test::Register loads[] = {{"tensor_load_1d", load<1>}, {"tensor_load_2d", load<2>}, {"tensor_load_3d", load<3>},
                                     {"tensor_load_4d", load<4>}, {"tensor_load_5d", load<5>}};
const simt_test::Register stores[] = {{"tensor_store_1d", store<1>}, {"tensor_store_2d", store<2>}, {"tensor_store_3d", store<3>},
                                      {"tensor_store_4d", store<4>}, {"tensor_store_5d", store<5>}};

}  // namespace
