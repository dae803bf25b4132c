// Kernels whose blocks race in global memory. test_global_races.py has what the report must say.
#include "cases.h"
#include "cuda/ptx/memory.cuh"

namespace {

using namespace tilestream;

CASE(blocks_write_the_same_place, .grid = 2, .block = 32) { data[threadIdx.x] = float(blockIdx.x); }

// Block 1 waits for the flag, but nothing orders the data before it.
CASE(flag_without_release, .grid = 2, .block = 32, .cooperative = true) {
  auto* flag = reinterpret_cast<unsigned*>(data + 4000);
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(flag, 1u);
  } else {
    if (threadIdx.x == 0) {
      while (ptx::ld_acquire_gpu(flag) == 0) {
      }
    }
    __syncthreads();
    data[threadIdx.x + 64] = data[threadIdx.x];
  }
}

// The last block to come sums for all, but no fence stands before its reads.
CASE(last_block_without_fence, .grid = 4, .block = 32, .smem_bytes = 4) {
  data[64 + 32 * blockIdx.x + threadIdx.x] = 1.0f;
  __threadfence();
  __syncthreads();
  unsigned& before = cuda::dynamic_smem<unsigned>();
  if (threadIdx.x == 0) before = atomicAdd(reinterpret_cast<unsigned*>(data + 4000), 1u);
  __syncthreads();
  if (before != 3) return;
  float sum = 0.0f;
  for (int block = 0; block < 4; ++block) sum += data[64 + 32 * block + threadIdx.x];
  data[threadIdx.x] = sum;
}

}  // namespace
