// All-reduce over the ranks of a tensor-parallel group, with residual addition, RMS norm and quantisation fused in
// (TokenWeave, 2505.11329, section 4).
//
//   sum = x of rank 0 + x of rank 1 + ...        in float, in this order (multimem: the switch's own, rounded)
//   residual = sum + residual                    rounded once; without a residual the norm is of the unrounded sum
//   out = residual * rsqrt(mean(residual^2) + eps) * weight, on every rank       (no weight: out = sum, a plain all-reduce)
//
// Token t belongs to rank t / ceil(num_tokens / world_size), which alone sums and norms it and writes the result to all;
// of a residual it has its own tokens only, and others' rows are neither read nor written. All ranks call it in the same
// order with the same sizes.
//
// x and the outputs are in symmetric memory: each rank has a block of it, of one size and with one layout, which all ranks
// see. So one offset names a tensor on every rank. The block begins with kSignalBytes that belong to these kernels, zero
// before the first call.
#pragma once

#include "tilestream/quantise.h"

namespace tilestream {

constexpr int kMaxRanks = 8;
constexpr int64_t kSignalBytes = 64 * 1024;
constexpr int kChannels = 2;  // calls that may run at the same time: of the two streams of a split step

struct Ranks {
  int32_t rank, world_size;      // world_size 1..kMaxRanks
  unsigned char* memory[kMaxRanks];  // each rank's block, where this process sees it
  unsigned char* multicast;      // all blocks at once through the NVLink switch; null: peer loads and stores
  int32_t channel;               // 0..kChannels - 1
  int32_t timeout_ms;            // a rank that others wait for longer is taken for dead
};

struct AllReduceRmsNormParams {
  Ranks ranks;
  int64_t x;            // offset in symmetric memory of [num_tokens, hidden], contiguous, 16-byte aligned; the result comes here,
                        // too, unless quantised
  void* residual;       // [num_tokens, hidden], or null
  const float* weight;  // [hidden], or null
  int64_t q, scale, sum;  // offsets of the arrays of QuantisedRows [num_tokens, hidden]; q < 0: not quantised
  int64_t k4;
  int64_t num_tokens, hidden, residual_row_stride;
  float eps;
  DType dtype;          // of x and residual
};

// The tokens of one rank.
struct TokenRange { int64_t begin, end; };
TILESTREAM_HOST_DEVICE constexpr TokenRange tokens_of(int64_t num_tokens, int rank, int world_size) {
  const int64_t each = ceil_div(num_tokens, world_size), begin = rank * each, end = begin + each;
  return {begin < num_tokens ? begin : num_tokens, end < num_tokens ? end : num_tokens};
}

namespace cpu {
// Throws std::runtime_error, with its number, when a rank does not come.
void allreduce_rmsnorm(const AllReduceRmsNormParams& params);
}  // namespace cpu

namespace cuda {
// A rank that does not come is written, plus one, to the word at kFaultOffset of this rank's block; no later call waits then.
constexpr int64_t kFaultOffset = kSignalBytes - 4;
void allreduce_rmsnorm(const AllReduceRmsNormParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
