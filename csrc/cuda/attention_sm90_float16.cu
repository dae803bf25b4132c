// Attention kernels for Hopper: caches of float16.
#include "cuda/attention_sm90.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_sm90_float16() {
  static constexpr AttentionRow kRows[] = {
      sm90_row<__half, __half, 0>(DType::kFloat16, DType::kFloat16),
      sm90_row<__half, __half, 1>(DType::kFloat16, DType::kFloat16),
      sm90_row<__half, __half, 2>(DType::kFloat16, DType::kFloat16),
      sm90_row<__half, __half, 3>(DType::kFloat16, DType::kFloat16),
      sm90_row<__half, __half, 4>(DType::kFloat16, DType::kFloat16),
      sm90_row<__half, __half, 5>(DType::kFloat16, DType::kFloat16),
  };
  return kRows;
}

}  // namespace tilestream::cuda
