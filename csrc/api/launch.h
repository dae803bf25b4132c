// From an op's checked parameters to the backend of its tensors.
#pragma once

#include <ATen/DeviceAccelerator.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>

#include "api/program.h"
#include "cuda/ops.h"

namespace tilestream::api {

// Runs the op where `where` is: on the CPU backend, or on the current stream of its GPU. An op whose CUDA kernels need memory
// between them (cuda::workspace_bytes(params)) gets it from torch's caching allocator: no cudaMalloc once warm, and in a
// captured graph memory of the graph's own pool.
template <class Params>
void launch(const at::Tensor& where, void (*cpu_op)(const Params&), void (*cuda_op)(const Params&, Stream),
            const Params& params) {
  const at::Device device = where.device();
  if (device.is_cpu()) return Program::launch(cpu_op, params);
  const c10::DeviceGuard guard(device);
  const auto stream = static_cast<Stream>(at::accelerator::getCurrentStream(device.index()).native_handle());
  if constexpr (requires { cuda::workspace_bytes(params); }) {
    Params with_workspace = params;
    const c10::DataPtr workspace = c10::GetAllocator(device.type())->allocate(cuda::workspace_bytes(params));
    with_workspace.workspace = workspace.get();
    cuda_op(with_workspace, stream);
  } else {
    cuda_op(params, stream);
  }
}

}  // namespace tilestream::api
