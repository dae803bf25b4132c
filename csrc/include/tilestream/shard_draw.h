// Draws from rows whose logits are on several ranks, each with a range of the token ids: sample.h's, without its top-k,
// penalties and logprobs.
//
// A rank tells of its part no more than masses: weights exp((logit - maximum) / temperature) in fixed point, whose sums are
// exact in any order. Between these ops ranks add up, or hand each other, what they return:
//   shard_histogram   four rounds, for top-p. Its threshold is a logit's 32 order-preserving bits, and a round finds the next
//                     8 of them: the masses of this rank's logits, by these 8 bits, where the bits before are those found
//   shard_masses      the masses that the filters keep, by 1,024 tokens
//   shard_draw        the token, on the rank in whose part the draw falls
// On a CPU the token is that of `sample` on the whole row, bit for bit. `sample` on a GPU, which reads a row once, sums it by
// float32 factors of 1,024 logits each: there tokens agree unless the draw, or top-p's sum, comes within about 1e-6 of the end of
// a token's share. Those of this op do not depend on the number of ranks on either.
#pragma once

#include "tilestream/types.h"

namespace tilestream {

constexpr int kHistogramBins = 256, kHistogramBits = 8, kHistogramRounds = 4;
constexpr int kMassChunk = 1024;  // tokens

struct ShardDrawParams {
  const float* logits;  // [batch_size, vocab_size]: this rank's; last dim contiguous
  int64_t logits_row_stride;
  const float* maxima;       // [batch_size] of whole rows; NaN or infinite: the row draws nothing
  const float* temperature;  // [batch_size], >= 0
  const float* top_p;        // [batch_size], (0, 1]; looked at in the first num_top_p rows
  const float* min_p;        // [batch_size], [0, 1]
  const int64_t* seeds;      // [batch_size]
  const int64_t* positions;  // [batch_size]
  int64_t num_top_p;         // rows, the first ones, that have a top-p threshold
  int32_t num_rounds;        // that are done
  const uint64_t* histograms;  // [num_rounds, num_top_p, kHistogramBins]: sums over the ranks
  uint64_t* histogram;         // [num_top_p, kHistogramBins] of shard_histogram, which adds to it
  uint64_t* chunk_masses;      // [batch_size, ceil(vocab_size / kMassChunk)]
  const uint64_t* masses;      // [world_size, batch_size]: every rank's sum of these
  int32_t world_size, rank;
  int64_t first_id;  // of this rank's tokens
  int64_t* tokens;   // [batch_size]; -1: the draw falls into another rank's part, or the row draws nothing
  int64_t batch_size, vocab_size;
};

namespace cpu {
void shard_histogram(const ShardDrawParams& params);
void shard_masses(const ShardDrawParams& params);
void shard_draw(const ShardDrawParams& params);
}  // namespace cpu

namespace cuda {
void shard_histogram(const ShardDrawParams& params, Stream stream);
void shard_masses(const ShardDrawParams& params, Stream stream);
void shard_draw(const ShardDrawParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
