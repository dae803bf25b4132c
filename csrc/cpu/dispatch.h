// Which SIMD level runs, chosen once at start-up from the CPU and TILESTREAM_SIMD.
#pragma once

#include <string>
#include <vector>

// Every op of the backend: (name, parameter struct). Each level defines all of them.
#define TILESTREAM_CPU_OPS(X)                  \
  X(attention, AttentionParams)                \
  X(merge_states, MergeStatesParams)           \
  X(append_kv, AppendKvParams)                 \
  X(gather_kv, GatherKvParams)                 \
  X(quantise, QuantiseParams)                  \
  X(linear, LinearParams)                      \
  X(pack_gguf, PackGgufParams)                 \
  X(pack_weight, PackParams)                   \
  X(embedding, EmbeddingParams)                \
  X(rms_norm, RmsNormParams)                   \
  X(act_and_mul, ActAndMulParams)              \
  X(allreduce_rmsnorm, AllReduceRmsNormParams) \
  X(sample, SampleParams)                      \
  X(shard_histogram, ShardDrawParams)          \
  X(shard_masses, ShardDrawParams)             \
  X(shard_draw, ShardDrawParams)

namespace tilestream::cpu {

std::string simd_level();                    // the level in use
std::vector<std::string> simd_levels();      // what this build and this CPU can run, weakest first
void set_simd_level(const std::string& name);  // throws std::invalid_argument naming what is allowed

// Adds the level "simt": the CUDA kernels on the emulator of tests/simt, from its shared library. For tests: it is picked by
// set_simd_level alone, and is not one of simd_levels().
void load_simt(const std::string& library);

// Throws. Here and not where it is called: code of a level that throws would share a weak symbol with the others.
[[noreturn]] void refuse_row_major();

}  // namespace tilestream::cpu
