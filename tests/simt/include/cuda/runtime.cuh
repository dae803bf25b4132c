// Twin of csrc/cuda/runtime.cuh: a launch runs on the emulator, and has ended when launch() returns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "simt/launch.h"

namespace tilestream::cuda {

template <class T>
SIMT_TWIN T& dynamic_smem() {
  return *static_cast<T*>(simt::self().shared);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, const Arguments&... arguments) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  simt::run(config, [&] { kernel(Parameters(arguments)...); }, reinterpret_cast<const void*>(kernel));
}

// What the test has set (simt::set_arch).
inline int device_arch() { return simt::arch(); }

// Few, so that blocks have a share of several pieces to walk.
template <class Kernel>
unsigned resident_blocks(Kernel, unsigned, size_t) {
  return 3;
}

}  // namespace tilestream::cuda
