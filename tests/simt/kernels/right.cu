// Kernels with no fault: under every seed the emulator reports nothing, and data[i + 2048] = data[255 - i] for i < 256.
#include "cases.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace {

using namespace tilestream;

struct Storage {
  alignas(16) float tile[2][128];
  uint64_t full[2], empty[2];
  float out[256];
};

__device__ __forceinline__ Storage& storage() { return cuda::dynamic_smem<Storage>(); }

CASE(barrier, .grid = 1, .block = 256, .smem_bytes = sizeof(Storage)) {
  storage().out[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[2048 + threadIdx.x] = storage().out[255 - threadIdx.x];
}

CASE(several_blocks, .grid = 8, .block = 32) {
  const int i = 32 * blockIdx.x + threadIdx.x;
  data[2048 + i] = data[255 - i];
}

// Two stages, filled by cp.async one step ahead.
CASE(cp_async_pipeline, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  const auto load = [&](int step) {
    ptx::cp_async<16>(&s.tile[step % 2][4 * threadIdx.x], data + 128 * step + 4 * threadIdx.x);
    ptx::cp_async_commit_group();
  };
  load(0);
  for (int step = 0; step < 2; ++step) {
    if (step < 1) load(step + 1);
    else ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += 32) data[2048 + 255 - (128 * step + i)] = s.tile[step % 2][i];
    __syncthreads();
  }
}

// Warp 0 produces, warp 1 consumes, through named barriers.
CASE(named_barriers, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < 8; ++step) {
    if (threadIdx.x < 32) {
      if (step > 0) ptx::bar_sync(2, 64);
      s.tile[0][lane] = data[32 * step + lane];
      ptx::bar_arrive(1, 64);
    } else {
      ptx::bar_sync(1, 64);
      data[2048 + 255 - (32 * step + lane)] = s.tile[0][lane];
      if (step < 7) ptx::bar_arrive(2, 64);
    }
  }
}

// Thread 0 of warp 0 loads by the copy engine, warp 1 consumes; two stages, four steps.
CASE(bulk_pipeline, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int step = 0; step < 4; ++step) {
    const int stage = step % 2, parity = step / 2 % 2;
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait_parity(&s.empty[stage], parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&s.full[stage], 256);
      ptx::cp_async_bulk_load(s.tile[stage], data + 64 * step, 256, &s.full[stage]);
    } else if (threadIdx.x >= 32) {
      const int lane = threadIdx.x % 32;
      ptx::mbarrier_wait_parity(&s.full[stage], parity);
      for (int i = lane; i < 64; i += 32) s.out[255 - (64 * step + i)] = s.tile[stage][i];
      ptx::mbarrier_arrive(&s.empty[stage]);
    }
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_store(data + 2048, s.out, 1024);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

// Warp 0 loads by cp.async and goes on; its copies arrive by themselves.
CASE(cp_async_mbarrier, .grid = 1, .block = 64, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(&s.full[i], 32), ptx::mbarrier_init(&s.empty[i], 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < 4; ++step) {
    const int stage = step % 2, parity = step / 2 % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait_parity(&s.empty[stage], parity ^ 1);
      ptx::cp_async<8>(&s.tile[stage][2 * lane], data + 64 * step + 2 * lane);
      ptx::cp_async_mbarrier_arrive_noinc(&s.full[stage]);
    } else {
      ptx::mbarrier_wait_parity(&s.full[stage], parity);
      for (int i = lane; i < 64; i += 32) data[2048 + 255 - (64 * step + i)] = s.tile[stage][i];
      ptx::mbarrier_arrive(&s.empty[stage]);
    }
  }
}

CASE(cluster, .grid = 2, .block = 128, .smem_bytes = sizeof(Storage), .cluster = 2) {
  Storage& s = storage();
  const unsigned rank = ptx::cluster_ctarank();
  s.tile[0][threadIdx.x] = data[128 * rank + threadIdx.x];
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  data[2048 + 128 * rank + threadIdx.x] = ptx::mapa(&s, rank ^ 1)->tile[0][127 - threadIdx.x];
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// The last block to arrive writes for all.
CASE(last_block, .grid = 4, .block = 64, .smem_bytes = sizeof(Storage)) {
  const int i = 64 * blockIdx.x + threadIdx.x;
  data[1024 + i] = data[i];
  __syncthreads();
  if (threadIdx.x == 0) storage().out[0] = float(ptx::atom_add_acq_rel_gpu(reinterpret_cast<unsigned*>(data + 4000), 1));
  __syncthreads();
  if (storage().out[0] != 3.0f) return;
  for (int j = threadIdx.x; j < 256; j += 64) data[2048 + j] = data[1024 + 255 - j];
}

// Blocks wait for each other, which only a cooperative launch allows.
CASE(grid_barrier, .grid = 4, .block = 64, .cooperative = true) {
  const int i = 64 * blockIdx.x + threadIdx.x;
  auto* arrived = reinterpret_cast<unsigned*>(data + 4000);
  data[1024 + i] = data[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::red_add_release_gpu(arrived, 1);
    while (ptx::ld_acquire_gpu(arrived) != 4) {
    }
  }
  __syncthreads();
  data[2048 + i] = data[1024 + 255 - i];
}

// Warpgroup 0 gives registers to warpgroups 1 and 2; one elected thread of it signals.
CASE(registers, .grid = 1, .block = 384, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  if (threadIdx.x == 0) ptx::mbarrier_init(&s.full[0], 1), ptx::fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && ptx::elect_sync()) ptx::mbarrier_arrive(&s.full[0]);
  } else {
    ptx::setmaxnreg_inc<232>();
    const int i = threadIdx.x - 128;
    ptx::mbarrier_wait_parity(&s.full[0], 0);
    data[2048 + i] = data[255 - i];
  }
}

__global__ void first_kernel(float* data) {
  ptx::griddepcontrol_launch_dependents();
  data[1024 + threadIdx.x] = data[threadIdx.x];
}
__global__ void dependent_kernel(float* data) {
  data[3000 + threadIdx.x] = data[threadIdx.x];
  ptx::griddepcontrol_wait();
  data[2048 + threadIdx.x] = data[1024 + 255 - threadIdx.x];
}
const simt_test::Register dependent("dependent_launch", [](float* data, const float*) {
  cuda::launch(first_kernel, {.grid = 1, .block = 256}, data);
  cuda::launch(dependent_kernel, {.grid = 1, .block = 256, .pdl = true}, data);
});

}  // namespace
