// Every op that has a CUDA kernel: (name, parameter struct). csrc/api and the emulator both read this list.
#pragma once

#include "tilestream/norm.h"

#define TILESTREAM_CUDA_OPS(X) \
  X(rms_norm, RmsNormParams)   \
  X(act_and_mul, ActAndMulParams)
