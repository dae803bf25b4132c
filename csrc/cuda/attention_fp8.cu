// Attention kernels: caches of e4m3. The products are in bfloat16, unless q is float16.
#include "cuda/attention_mma.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_fp8() {
  static constexpr AttentionRow kRows[] = {
      ATTENTION_MMA_ROWS(kFloat8E4M3, kBFloat16, __nv_bfloat16, __nv_fp8_e4m3),
      ATTENTION_MMA_ROWS(kFloat8E4M3, kFloat16, __half, __nv_fp8_e4m3),
      ATTENTION_MMA_ROWS(kFloat8E4M3, kFloat32, __nv_bfloat16, __nv_fp8_e4m3),
      ATTENTION_MMA_ROWS(kFloat8E4M3, kFloat8E4M3, __nv_bfloat16, __nv_fp8_e4m3),
  };
  return kRows;
}

}  // namespace tilestream::cuda
