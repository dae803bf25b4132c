// Twin of csrc/cuda/ptx/barrier.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

SIMT_TWIN void bar_sync(int id, int num_threads) { simt::barrier_sync("bar.sync", id, num_threads); }
SIMT_TWIN void bar_arrive(int id, int num_threads) { simt::barrier_arrive("bar.arrive", id, num_threads); }

}  // namespace tilestream::ptx
