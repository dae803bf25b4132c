// Attention kernels: what tensor cores would round: float32 operands, and float16 caches (which hold neither
// bfloat16's range nor float32's precision) with another q.
#include "cuda/attention_float.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_float() {
  static constexpr AttentionRow kRows[] = {
      {DType::kFloat16, DType::kBFloat16, 256, 256, launch_attention_float<__half>},
      {DType::kFloat16, DType::kFloat32, 256, 256, launch_attention_float<__half>},
      {DType::kFloat32, DType::kFloat32, 256, 256, launch_attention_float<float>},
      {DType::kFloat32, DType::kFloat16, 256, 256, launch_attention_float<float>},
      {DType::kFloat32, DType::kBFloat16, 256, 256, launch_attention_float<float>},
      {DType::kUInt8, DType::kFloat32, 256, 256, launch_attention_float<Int8>},
      {DType::kUInt4, DType::kFloat32, 256, 256, launch_attention_float<Int4>},
  };
  return kRows;
}

}  // namespace tilestream::cuda
