// How the ranks of an all-reduce wait for each other: signals between their blocks of one number.
//
// A block tells the block of its number on every rank, itself among them, how far it has come, and waits until
// each of those has told it the same. How far is a count of barriers: two a call, kept from call to call in the
// rank's own memory, so a replayed CUDA graph counts on, calls with fewer blocks leave the others' counts as they
// are, and nothing is ever reset. Whoever is ahead may overwrite its word before the other has looked: more is as
// good as enough.
//
// Each word is written by one block alone, with release after everything that its block did, and read with
// acquire: one trip through NVLink a barrier, about 1 us (an estimate), behind a fence that waits for the block's
// own stores.
//
// Blocks wait for others on other GPUs, so each has to become resident whatever else waits: no block waits for
// another of its own launch, both channels together are 2 * kMaxRankBlocks blocks, which a GPU of 32 SMs holds
// beside each other, and what else runs there ends by itself.
#pragma once

#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/timer.cuh"
#include "tilestream/allreduce.h"

namespace tilestream::cuda {

constexpr int kMaxRankBlocks = 16;  // TokenWeave, figure 10: of an H100's SMs 8 to 16 fill the link

// What each rank's symmetric memory begins with, for each channel.
struct RankSignals {
  unsigned from[kMaxRankBlocks][kMaxRanks];  // how far each rank's block of this number has come, as it has told
  unsigned past[kMaxRankBlocks];             // how far this rank's own had come at the end of its last call
};
static_assert(kChannels * sizeof(RankSignals) <= kFaultOffset, "the word of faults comes behind the signals");

__device__ __forceinline__ RankSignals& signals_of(const Ranks& ranks, int rank) {
  return reinterpret_cast<RankSignals*>(ranks.memory[rank])[ranks.channel];
}

// Waits until `rank` has come as far as `count`; false if that takes too long, and then it is written down.
__device__ __forceinline__ bool wait_for(const Ranks& ranks, int rank, unsigned count, unsigned* fault) {
  const unsigned* const signal = &signals_of(ranks, ranks.rank).from[blockIdx.x][rank];
  const uint64_t patience_ns = uint64_t(ranks.timeout_ms) * 1000000, begin = ptx::globaltimer();
  while (int(ptx::ld_acquire_sys(signal) - count) < 0) {  // counts go round
    if (ptx::globaltimer() - begin > patience_ns) {
      ptx::st_release_sys(fault, unsigned(rank) + 1);
      return false;
    }
  }
  return true;
}

// Until every rank's block of this number has come as far as `count`, and what they did before is seen here.
// False, for the whole block, if a rank has not come, now or in an earlier call: then nothing of the others'
// memory may be touched. kAlias: what it orders went, or will go, through the multicast address.
template <bool kAlias>
__device__ __forceinline__ bool meet(const Ranks& ranks, unsigned count) {
  __syncthreads();
  bool all_came = true;
  if (threadIdx.x < unsigned(ranks.world_size)) {
    auto* const fault = reinterpret_cast<unsigned*>(ranks.memory[ranks.rank] + kFaultOffset);
    const unsigned fault_before = ptx::ld_relaxed_sys(fault);  // comes while the signal goes out
    if constexpr (kAlias) ptx::fence_proxy_alias();
    ptx::st_release_sys(&signals_of(ranks, threadIdx.x).from[blockIdx.x][ranks.rank], count);
    all_came = fault_before == 0 && wait_for(ranks, threadIdx.x, count, fault);
    if constexpr (kAlias) ptx::fence_proxy_alias();
  }
  return __syncthreads_and(all_came);
}

}  // namespace tilestream::cuda
