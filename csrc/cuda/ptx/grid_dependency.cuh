// griddepcontrol: a kernel launched with LaunchConfig::pdl may start before the one before it in the stream
// has ended. PTX ISA 9.7.13.13, sm_90. Twin: tests/simt/include/cuda/ptx/grid_dependency.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Until the kernel before has ended, and its memory is visible to this grid: before the first access to
// anything that kernel writes, and before the first write to anything it reads. Returns at once without
// LaunchConfig::pdl.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start once every block has called this or ended. Promises nothing about memory.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace tilestream::ptx
