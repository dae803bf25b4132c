// Stands for csrc/cuda/*_sm90*.cu in a build that is not for sm_90a: a Hopper GPU then runs the kernels of its elders.
#include "cuda/attention_row.h"
#include "cuda/linear_sm90.h"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_sm90_bfloat16() { return {}; }
std::span<const AttentionRow> attention_rows_of_sm90_float16() { return {}; }
std::span<const AttentionRow> attention_rows_of_sm90_fp8() { return {}; }
std::span<const AttentionRow> attention_rows_of_sm90_int() { return {}; }
bool linear_sm90(const LinearParams&, Stream) { return false; }

}  // namespace tilestream::cuda
