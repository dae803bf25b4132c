// How a launch reaches the emulator. csrc/cuda/runtime.cuh has the same LaunchConfig and launch() for a GPU.
#pragma once

#include <cstddef>
#include <functional>

#include "simt/vector_types.h"
#include "tilestream/types.h"

namespace tilestream::cuda {

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  Stream stream = nullptr;
  unsigned cluster = 1;      // blocks per cluster, along x
  bool cooperative = false;  // all blocks are resident at once: they may wait for each other
  bool pdl = false;          // may start before the kernel before it has ended; see ptx/grid_dependency.cuh
};

}  // namespace tilestream::cuda

namespace simt {

using tilestream::cuda::LaunchConfig;

// Runs every thread of the grid; throws std::runtime_error with a report at the first fault.
void run(const LaunchConfig& config, const std::function<void()>& kernel, const void* kernel_address);

// Order of threads and moment of asynchronous effects from now on, on every host thread.
//   0: threads in order, asynchronous effects as late as possible
//   1: the last thread first, effects as early as possible
//   2 and up: everything at random
void set_seed(unsigned long long seed);

// The compute capability that the emulated devices say they have, 80 before it is set. Kernels are chosen by it; every
// device can run all of them.
void set_arch(int arch);
int arch();

}  // namespace simt
