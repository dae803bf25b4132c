// Twin of csrc/cuda/ptx/grid_dependency.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

SIMT_TWIN void griddepcontrol_wait() { simt::griddepcontrol_wait(); }
SIMT_TWIN void griddepcontrol_launch_dependents() {}

}  // namespace tilestream::ptx
