// What every kernel file includes first: CUDA's types, shared memory, and the one way to launch.
// tests/simt/include/cuda/runtime.cuh is its twin for a machine without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tilestream/taken_sms.h"
#include "tilestream/types.h"

namespace tilestream::cuda {

// The block's shared memory, all of it, as the kernel's SharedStorage. Launch with smem_bytes = sizeof(SharedStorage).
// Aligned to 1024 bytes: the 128-byte swizzle of TMA and wgmma repeats at that distance.
template <class T>
__device__ __forceinline__ T& dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char dynamic_smem_bytes[];
  return *reinterpret_cast<T*>(dynamic_smem_bytes);
}

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  Stream stream = nullptr;
  unsigned cluster = 1;      // blocks per cluster, along x
  bool cooperative = false;  // all blocks are resident at once: they may wait for each other
  bool pdl = false;          // may start before the kernel before it has ended; see ptx/grid_dependency.cuh
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<config>>>(arguments...). An empty grid is not launched.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, const Arguments&... arguments) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  constexpr size_t kDefaultSmemBytes = 48 * 1024;  // more has to be asked for (CUDA C++ Programming Guide, table of limits)
  if (config.smem_bytes > kDefaultSmemBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem_bytes)),
          "cudaFuncSetAttribute");
  if (config.cluster > 8)  // the portable limit
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");

  cudaLaunchAttribute attributes[3];
  unsigned num_attributes = 0;
  if (config.cluster > 1) {
    attributes[num_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[num_attributes++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    attributes[num_attributes].id = cudaLaunchAttributeCooperative;
    attributes[num_attributes++].val.cooperative = 1;
  }
  if (config.pdl) {
    attributes[num_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t cuda_config{};
  cuda_config.gridDim = config.grid;
  cuda_config.blockDim = config.block;
  cuda_config.dynamicSmemBytes = config.smem_bytes;
  cuda_config.stream = config.stream;
  cuda_config.attrs = attributes;
  cuda_config.numAttrs = num_attributes;
  check(cudaLaunchKernelEx(&cuda_config, kernel, Parameters(arguments)...), "kernel launch");
}

// The current device's compute capability, 10 * major + minor: 80, 86, 89, 90, ...
inline int device_arch() {
  int device, major, minor;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

// How many blocks of this launch the device holds at once: the grid of a kernel whose blocks stay and walk their share.
template <class Kernel>
unsigned resident_blocks(Kernel kernel, unsigned threads, size_t smem_bytes) {
  int device, num_sms, blocks_per_sm;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes)), "cudaFuncSetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, int(threads), smem_bytes), "occupancy");
  return unsigned(std::max(num_sms - taken_sms, 1) * blocks_per_sm);
}

}  // namespace tilestream::cuda
