// Attention kernels for Hopper: caches of bfloat16.
#include "cuda/attention_sm90.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_sm90_bfloat16() {
  // A bfloat16 cache rounds q to bfloat16, whatever its dtype.
  static constexpr AttentionRow kRows[] = {
      sm90_row<__nv_bfloat16, __nv_bfloat16, 0>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 1>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 2>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 3>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 4>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 5>(DType::kBFloat16, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 0>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 1>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 2>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 3>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 4>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 5>(DType::kBFloat16, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 0>(DType::kBFloat16, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 1>(DType::kBFloat16, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 2>(DType::kBFloat16, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 3>(DType::kBFloat16, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 4>(DType::kBFloat16, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_bfloat16, 5>(DType::kBFloat16, DType::kFloat32),
  };
  return kRows;
}

}  // namespace tilestream::cuda
