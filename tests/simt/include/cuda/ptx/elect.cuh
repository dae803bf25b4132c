// Twin of csrc/cuda/ptx/elect.cuh.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

SIMT_TWIN bool elect_sync() {
  simt::warp_collective("elect.sync", simt::kFullMask, nullptr, [](simt::LaneArguments) {});
  return simt::self().lane == simt::elected_lane();
}

}  // namespace tilestream::ptx
