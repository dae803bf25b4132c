// Twin of csrc/cuda/runtime.cuh: a launch runs on the emulator, and has ended when launch() returns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <new>
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

class StreamMemory {
 public:
  StreamMemory(size_t num_bytes, Stream) {
    if (num_bytes > 0) data_ = ::operator new(num_bytes, std::align_val_t(256));
  }
  ~StreamMemory() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(256));
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Few, so that blocks have a share of several pieces to walk.
template <class Kernel>
unsigned resident_blocks(Kernel, unsigned, size_t) {
  return 3;
}

}  // namespace tilestream::cuda
