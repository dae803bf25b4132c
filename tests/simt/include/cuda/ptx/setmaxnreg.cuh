// Twin of csrc/cuda/ptx/setmaxnreg.cuh.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"

namespace tilestream::ptx {

template <int kRegisters>
SIMT_TWIN void setmaxnreg_inc() { simt::setmaxnreg("setmaxnreg.inc", kRegisters, true); }
template <int kRegisters>
SIMT_TWIN void setmaxnreg_dec() { simt::setmaxnreg("setmaxnreg.dec", kRegisters, false); }

}  // namespace tilestream::ptx
