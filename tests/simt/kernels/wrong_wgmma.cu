// Kernels with one fault each, around wgmma. test_simt.py has what the report must say.
#include "cases.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace tilestream;

struct Storage {
  alignas(1024) unsigned tile[2][64 * 32];  // 64 rows of 128 bytes
  float out[128];
};

__device__ __forceinline__ Storage& storage() { return cuda::dynamic_smem<Storage>(); }

__device__ __forceinline__ void fill(unsigned (&tile)[64 * 32]) {
  for (int i = threadIdx.x; i < 64 * 32; i += 128) tile[i] = 0;
}
__device__ __forceinline__ uint64_t describe(const unsigned (&tile)[64 * 32]) {
  return ptx::wgmma_descriptor(tile, ptx::Swizzle::k128, 1024);
}

// Two filled tiles that wgmma may read.
__device__ __forceinline__ void start(Storage& s) {
  fill(s.tile[0]);
  fill(s.tile[1]);
  ptx::fence_proxy_async();
  __syncthreads();
}

CASE(accumulator_read_before_its_wait, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), false);
  ptx::wgmma_commit_group();
  data[threadIdx.x] = d[5];
  ptx::wgmma_wait_group<0>(d);
}

// Waits, but for the group before.
CASE(accumulator_of_a_later_group, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[2][4];
  for (int i = 0; i < 2; ++i) {
    ptx::wgmma_fence(d[i]);
    ptx::wgmma_m64k16_f16(d[i], describe(s.tile[0]), describe(s.tile[1]), false);
    ptx::wgmma_commit_group();
  }
  ptx::wgmma_wait_group<1>(d[0]);
  data[threadIdx.x] = d[1][0];
}

CASE(fragment_changed_before_its_wait, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  unsigned a[4] = {1, 2, 3, 4};
  for (int step = 0; step < 2; ++step) {
    ptx::wgmma_fence(d, a);
    ptx::wgmma_m64k16_f16(d, a, describe(s.tile[0]), step > 0);
    ptx::wgmma_commit_group();
    a[1] = threadIdx.x;
  }
  ptx::wgmma_wait_group<0>(d, a);
  data[threadIdx.x] = d[0];
}

CASE(stage_overwritten_under_a_wgmma, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), false);
  ptx::wgmma_commit_group();
  __syncthreads();
  fill(s.tile[1]);
  ptx::wgmma_wait_group<0>(d);
  data[threadIdx.x] = d[0];
}

CASE(missing_proxy_fence_before_wgmma, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  fill(s.tile[0]);
  __syncthreads();
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[0]), false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d);
}

CASE(missing_barrier_before_wgmma, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  fill(s.tile[0]);
  ptx::fence_proxy_async();
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[0]), false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d);
}

CASE(missing_wgmma_fence, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  for (int step = 0; step < 2; ++step) {
    if (step == 0) ptx::wgmma_fence(d);
    ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>(d);
    for (float& x : d) x *= 0.5f;
  }
  data[threadIdx.x] = d[0];
}

CASE(accumulator_not_named_by_its_wait, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  data[threadIdx.x] = d[0];
}

CASE(wgmma_by_one_warp, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[32];
  if (threadIdx.x >= 32) return;
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), false);
}

CASE(wgmma_tile_out_of_bounds, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {
  Storage& s = storage();
  start(s);
  float d[128];  // 256 columns, of which the tile has 64
  ptx::wgmma_fence(d);
  ptx::wgmma_m64k16_f16(d, describe(s.tile[0]), describe(s.tile[1]), false);
}

}  // namespace
