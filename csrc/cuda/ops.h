// Every op that has a CUDA kernel: (name, parameter struct). csrc/api and the emulator both read this list.
#pragma once

#include "tilestream/allreduce.h"
#include "tilestream/append_kv.h"
#include "tilestream/attention.h"
#include "tilestream/linear.h"
#include "tilestream/norm.h"
#include "tilestream/quantise.h"
#include "tilestream/sample.h"
#include "tilestream/shard_draw.h"

#define TILESTREAM_CUDA_OPS(X)                 \
  X(attention, AttentionParams)                \
  X(merge_states, MergeStatesParams)           \
  X(append_kv, AppendKvParams)                 \
  X(gather_kv, GatherKvParams)                 \
  X(quantise, QuantiseParams)                  \
  X(linear, LinearParams)                      \
  X(embedding, EmbeddingParams)                \
  X(rms_norm, RmsNormParams)                   \
  X(act_and_mul, ActAndMulParams)              \
  X(allreduce_rmsnorm, AllReduceRmsNormParams) \
  X(sample, SampleParams)                      \
  X(shard_histogram, ShardDrawParams)          \
  X(shard_masses, ShardDrawParams)             \
  X(shard_draw, ShardDrawParams)
