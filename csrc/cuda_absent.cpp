// Stands for csrc/cuda where no nvcc was found: CUDA tensors meet a sentence instead of an unknown op.
#include <stdexcept>

#include "cuda/ops.h"

namespace tilestream::cuda {

#define ABSENT(op, Params)                                                                                           \
  void op(const Params&, Stream) {                                                                                   \
    throw std::runtime_error(#op " on CUDA tensors: this build has no CUDA kernels, for nvcc was not found when it " \
                             "was made; install the CUDA toolkit, then tilestream again");                           \
  }
TILESTREAM_CUDA_OPS(ABSENT)

int64_t workspace_bytes(const SampleParams&) { return 0; }

}  // namespace tilestream::cuda
