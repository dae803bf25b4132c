// The linears for Hopper alone; in a build without sm_90a there are none.
#pragma once

#include "tilestream/linear.h"

namespace tilestream::cuda {

// Weights in groups of 128 times quantised rows (x_q). False, and nothing done: not on this GPU, or not rows at multiples of
// 16 bytes.
bool linear_sm90(const LinearParams& params, Stream stream);

}  // namespace tilestream::cuda
