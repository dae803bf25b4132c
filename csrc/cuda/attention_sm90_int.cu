// Attention kernels for Hopper: caches of int8 and int4 with q of 16 bits.
#include "cuda/attention_sm90.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_sm90_int() {
  static constexpr AttentionRow kRows[] = {
      sm90_row<__nv_bfloat16, Int8, 6>(DType::kUInt8, DType::kBFloat16),
      sm90_row<__nv_bfloat16, Int8, 7>(DType::kUInt8, DType::kBFloat16),
      sm90_row<__nv_bfloat16, Int8, 8>(DType::kUInt8, DType::kBFloat16),
      sm90_row<__half, Int8, 6>(DType::kUInt8, DType::kFloat16),
      sm90_row<__half, Int8, 7>(DType::kUInt8, DType::kFloat16),
      sm90_row<__half, Int8, 8>(DType::kUInt8, DType::kFloat16),
      sm90_row<__nv_bfloat16, Int4, 6>(DType::kUInt4, DType::kBFloat16),
      sm90_row<__nv_bfloat16, Int4, 7>(DType::kUInt4, DType::kBFloat16),
      sm90_row<__nv_bfloat16, Int4, 8>(DType::kUInt4, DType::kBFloat16),
      sm90_row<__half, Int4, 6>(DType::kUInt4, DType::kFloat16),
      sm90_row<__half, Int4, 7>(DType::kUInt4, DType::kFloat16),
      sm90_row<__half, Int4, 8>(DType::kUInt4, DType::kFloat16),
  };
  return kRows;
}

}  // namespace tilestream::cuda
