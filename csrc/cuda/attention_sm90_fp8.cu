// Attention kernels for Hopper: caches of e4m3. The products are in bfloat16, unless q is float16 or e4m3 itself.
#include "cuda/attention_sm90.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_sm90_fp8() {
  static constexpr AttentionRow kRows[] = {
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 6>(DType::kFloat8E4M3, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 7>(DType::kFloat8E4M3, DType::kBFloat16),
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 8>(DType::kFloat8E4M3, DType::kBFloat16),
      sm90_row<__half, __nv_fp8_e4m3, 6>(DType::kFloat8E4M3, DType::kFloat16),
      sm90_row<__half, __nv_fp8_e4m3, 7>(DType::kFloat8E4M3, DType::kFloat16),
      sm90_row<__half, __nv_fp8_e4m3, 8>(DType::kFloat8E4M3, DType::kFloat16),
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 6>(DType::kFloat8E4M3, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 7>(DType::kFloat8E4M3, DType::kFloat32),
      sm90_row<__nv_bfloat16, __nv_fp8_e4m3, 8>(DType::kFloat8E4M3, DType::kFloat32),
      sm90_row<__nv_fp8_e4m3, __nv_fp8_e4m3, 9>(DType::kFloat8E4M3, DType::kFloat8E4M3),
      sm90_row<__nv_fp8_e4m3, __nv_fp8_e4m3, 10>(DType::kFloat8E4M3, DType::kFloat8E4M3),
      sm90_row<__nv_fp8_e4m3, __nv_fp8_e4m3, 11>(DType::kFloat8E4M3, DType::kFloat8E4M3),
  };
  return kRows;
}

}  // namespace tilestream::cuda
