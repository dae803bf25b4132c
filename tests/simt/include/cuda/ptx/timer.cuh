// Twin of csrc/cuda/ptx/timer.cuh: a clock that stands still while any thread gets on.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

SIMT_TWIN uint64_t globaltimer() { return simt::time_ns(); }

}  // namespace tilestream::ptx
