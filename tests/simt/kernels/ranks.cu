// Kernels of several ranks. Rank r has buffers[r]: 256 floats of input, 256 of result from 256 on, signals
// from 512 on. data[2048 + i] of the test is the sum over the ranks, as rank 0 has it.
#include "cases.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/multimem.cuh"

namespace {

using namespace tilestream;

struct Ranks {
  float* buffers[8];
  float* multicast;
  int rank, num;
};

__device__ __forceinline__ unsigned* signal(float* buffer, int round) {
  return reinterpret_cast<unsigned*>(buffer + 512) + round;
}

// Every block of every rank has come this far.
template <class Signal>
__device__ __forceinline__ void barrier(const Ranks& p, int round, Signal send) {
  __syncthreads();
  if (threadIdx.x == 0) {
    send(round);
    while (ptx::ld_acquire_sys(signal(p.buffers[p.rank], round)) < p.num * gridDim.x) {
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void write_input(const Ranks& p, int i) { p.buffers[p.rank][i] = float(1000 * p.rank + i); }

__global__ void peers_kernel(const __grid_constant__ Ranks p) {
  const int i = 64 * blockIdx.x + threadIdx.x;
  write_input(p, i);
  barrier(p, 0, [&](int round) {
    for (int peer = 0; peer < p.num; ++peer) ptx::red_add_release_sys(signal(p.buffers[peer], round), 1);
  });
  float sum = 0;
  for (int peer = 0; peer < p.num; ++peer) sum += p.buffers[peer][i];
  p.buffers[p.rank][256 + i] = sum;
}

// The last rank signals to all but rank 0.
__global__ void lost_signal_kernel(const __grid_constant__ Ranks p) {
  write_input(p, 64 * blockIdx.x + threadIdx.x);
  barrier(p, 0, [&](int round) {
    for (int peer = p.rank == p.num - 1; peer < p.num; ++peer) ptx::red_add_release_sys(signal(p.buffers[peer], round), 1);
  });
  barrier(p, 1, [&](int round) {
    for (int peer = 0; peer < p.num; ++peer) ptx::red_add_release_sys(signal(p.buffers[peer], round), 1);
  });
}

// One rank in turn sums each 16 bytes, for all.
__global__ void multimem_kernel(const __grid_constant__ Ranks p) {
  write_input(p, 64 * blockIdx.x + threadIdx.x);
  const auto send = [&](int round) { ptx::multimem_red_add_release_sys(signal(p.multicast, round), 1); };
  barrier(p, 0, send);
  const int i = 64 * blockIdx.x + 4 * threadIdx.x;
  if (threadIdx.x < 16 && int(threadIdx.x) % p.num == p.rank) {
    const float4 sum = ptx::multimem_ld_reduce_add_f32(p.multicast + i);
    ptx::multimem_st(p.multicast + 256 + i, reinterpret_cast<const uint4&>(sum));
  }
  barrier(p, 1, send);
}

template <auto kKernel>
void run(const simt_test::RankBuffers& buffers) {
  Ranks p{};
  for (int rank = 0; rank < buffers.num; ++rank) p.buffers[rank] = buffers.of_rank[rank];
  p.multicast = buffers.multicast, p.rank = buffers.rank, p.num = buffers.num;
  cuda::launch(kKernel, {.grid = 4, .block = 64, .cooperative = true}, p);
}

const simt_test::RegisterRanks kernels[] = {
    {"peers", run<peers_kernel>}, {"lost_signal", run<lost_signal_kernel>}, {"multimem", run<multimem_kernel>}};

}  // namespace
