// One pass from logits to tokens: penalties, temperature, top-k, top-p, min-p, seeded draw, logprobs.
#pragma once

#include "tilestream/types.h"

namespace tilestream {

// Per row, in this order: repetition (prompt + output), then presence and frequency (output only) penalties;
// temperature 0 takes the arg max (lowest id on ties); otherwise softmax(logits / temperature), keep the
// top_k largest, of those (renormalised) the smallest set with mass >= top_p, of those all with
// p >= min_p * p_max; ties at a threshold are all kept for top-p/min-p, by lowest id for top-k. The draw is
// the inverse CDF in id order at u = philox(seed, position). Logprobs are log_softmax of the raw logits.
struct SampleParams {
  const float* logits;          // [batch_size, vocab_size]; last dim contiguous
  int64_t logits_row_stride;
  const float* temperature;     // [batch_size], >= 0
  const int32_t* top_k;         // [batch_size]; 0: off
  const float* top_p;           // [batch_size], (0, 1]; 1: off
  const float* min_p;           // [batch_size], [0, 1]; 0: off
  const float* repetition_penalty;  // [batch_size], 1: off; or null: no penalties at all, history unused
  const float* presence_penalty;    // [batch_size], 0: off
  const float* frequency_penalty;   // [batch_size], 0: off
  const int32_t* history;           // token ids, prompt then output of each row
  const int32_t* history_indptr;    // [batch_size + 1]
  const int32_t* history_prompt_len;  // [batch_size]: how many of a row's history are prompt
  const int64_t* seeds;         // [batch_size]
  const int64_t* positions;     // [batch_size]: index of the drawn token in its sequence
  int64_t* tokens;              // [batch_size]; -1: the row has a NaN, or nothing finite to draw
  float* logprobs;              // [batch_size] of the drawn token; null: not wanted (several times faster)
  int32_t num_top_logprobs;     // 0..64
  int64_t* top_ids;             // [batch_size, num_top_logprobs], by falling logprob, then rising id
  float* top_logprobs;          // [batch_size, num_top_logprobs]
  int64_t batch_size, vocab_size;
  void* workspace;              // cuda::workspace_bytes() bytes, 16-byte aligned; unused by the CPU backend
};

namespace cpu {
void sample(const SampleParams& params);
}  // namespace cpu

namespace cuda {
int64_t workspace_bytes(const SampleParams& params);
void sample(const SampleParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
