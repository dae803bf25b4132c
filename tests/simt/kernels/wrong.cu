// Kernels with one fault each. test_simt.py has what the report must say.
#include "cases.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"

namespace {

using namespace tilestream;

struct Storage {
  alignas(16) float tile[2][256];
  uint64_t full[2];
};

__device__ __forceinline__ Storage& storage() { return cuda::dynamic_smem<Storage>(); }

CASE(missing_barrier, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  s.tile[0][threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = s.tile[0][63 - threadIdx.x];
}

CASE(missing_syncwarp, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  s.tile[0][threadIdx.x] = data[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);  // orders no memory
  data[threadIdx.x] = s.tile[0][threadIdx.x ^ 1] + other;
}

// The second write to the tile may come before the first was read by all.
CASE(overwritten_tile, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  for (int step = 0; step < 2; ++step) {
    s.tile[0][threadIdx.x] = data[threadIdx.x + 64 * step];
    __syncthreads();
    data[threadIdx.x + 64 * step] = s.tile[0][63 - threadIdx.x];
  }
}

CASE(missing_cp_async_wait, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  ptx::cp_async<16>(&s.tile[0][4 * threadIdx.x], data + 4 * threadIdx.x);
  ptx::cp_async_commit_group();
  __syncthreads();
  data[threadIdx.x] = s.tile[0][4 * threadIdx.x];
}

// Waits, but for the group before.
CASE(wrong_cp_async_group, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async<16>(&s.tile[stage][4 * threadIdx.x], data + 128 * stage + 4 * threadIdx.x);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  data[threadIdx.x] = s.tile[1][4 * threadIdx.x];
}

// A stage is filled again while other threads may still read it.
CASE(overwritten_stage, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  for (int step = 0; step < 3; ++step) {
    ptx::cp_async<16>(&s.tile[step % 2][4 * threadIdx.x], data + 256 * step + 4 * threadIdx.x);
    ptx::cp_async_wait_all();
    if (step < 2) __syncthreads();
    data[threadIdx.x] = s.tile[step % 2][255 - 4 * threadIdx.x];
  }
}

CASE(divergent_shuffle, .grid = 1, .block = 32) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
  else data[threadIdx.x] = __shfl_down_sync(0xffffffffu, data[threadIdx.x], 1);
}

CASE(shuffle_with_returned_lane, .grid = 1, .block = 32) {
  if (threadIdx.x == 5) return;
  data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

CASE(shuffle_mask_without_caller, .grid = 1, .block = 32) {
  data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, data[threadIdx.x], 1);
}

CASE(divergent_syncthreads, .grid = 1, .block = 64) {
  if (threadIdx.x < 32) {
    __syncthreads();
    data[threadIdx.x] = 1;
  } else {
    data[threadIdx.x] = 2;
    __syncthreads();
  }
}

CASE(named_barrier_count, .grid = 1, .block = 64) {
  ptx::bar_sync(1, threadIdx.x < 32 ? 64 : 32);
}

CASE(named_barrier_deadlock, .grid = 1, .block = 64) {
  if (threadIdx.x < 32) ptx::bar_sync(1, 64);
  else ptx::bar_sync(2, 64);
}

CASE(shared_out_of_bounds, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  storage().tile[0][4 * threadIdx.x + 512] = data[threadIdx.x];
}

CASE(global_out_of_bounds, .grid = 1, .block = 32) { data[4096 + threadIdx.x] = 0.0f; }

CASE(unmatched_cluster_arrive, .grid = 2, .block = 32, .cluster = 2) {
  if (ptx::cluster_ctarank() == 0) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_arrive();
  }
}

CASE(cluster_wait_for_a_block_that_never_arrives, .grid = 2, .block = 32, .cluster = 2) {
  ptx::barrier_cluster_arrive();
  if (ptx::cluster_ctarank() == 0) ptx::barrier_cluster_wait();
  else while (ptx::ld_acquire_gpu(reinterpret_cast<unsigned*>(data)) != 12345) {}
}

CASE(missing_cluster_barrier, .grid = 2, .block = 32, .smem_bytes = sizeof(Storage), .cluster = 2) {
  Storage& s = storage();
  s.tile[0][threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x + 32] = ptx::mapa(&s, ptx::cluster_ctarank() ^ 1)->tile[0][threadIdx.x];
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

__device__ __forceinline__ void start_mbarriers(Storage& s) {
  if (threadIdx.x == 0) {
    for (uint64_t& bar : s.full) ptx::mbarrier_init(&bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// A fresh mbarrier counts as completed at parity 1: the wait returns at once.
CASE(wrong_mbarrier_phase, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start_mbarriers(s);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.full[0], 1024);
    ptx::cp_async_bulk_load(s.tile[0], data, 1024, &s.full[0]);
  }
  __syncwarp();
  ptx::mbarrier_wait_parity(&s.full[0], 1);
  data[threadIdx.x] = s.tile[0][threadIdx.x];
}

CASE(wrong_expected_bytes, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start_mbarriers(s);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.full[0], 2048);
    ptx::cp_async_bulk_load(s.tile[0], data, 1024, &s.full[0]);
  }
  ptx::mbarrier_wait_parity(&s.full[0], 0);
}

// The copy behind the arrival is not part of it.
CASE(copy_behind_its_arrival, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  if (threadIdx.x == 0) ptx::mbarrier_init(&s.full[0], 32), ptx::fence_mbarrier_init();
  __syncwarp();
  ptx::cp_async_mbarrier_arrive_noinc(&s.full[0]);
  ptx::cp_async<16>(&s.tile[0][4 * threadIdx.x], data + 4 * threadIdx.x);
  ptx::mbarrier_wait_parity(&s.full[0], 0);
  data[threadIdx.x] = s.tile[0][4 * (31 - threadIdx.x)];
}

CASE(mbarrier_used_before_its_init_is_ordered, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  if (threadIdx.x == 0) ptx::mbarrier_init(&s.full[0], 64);
  ptx::bar_sync(1 + threadIdx.x / 32, 32);  // orders each warp by itself
  ptx::mbarrier_arrive(&s.full[0]);
}

CASE(missing_proxy_fence, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  s.tile[0][threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) ptx::cp_async_bulk_store(data + 1024, s.tile[0], 128);
}

CASE(missing_grid_barrier, .grid = 2, .block = 32) {  // waits for a block that is not resident
  auto* flag = reinterpret_cast<unsigned*>(data);
  if (blockIdx.x == 0) while (ptx::ld_acquire_gpu(flag) == 0) {}
  else if (blockIdx.x == 1) while (ptx::ld_acquire_gpu(flag + 1) == 0) {}
}

}  // namespace
