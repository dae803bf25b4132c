// Attention kernels: caches of 16-bit floats.
#include "cuda/attention_mma.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_16bit() {
  static constexpr AttentionRow kRows[] = {
      // A bfloat16 cache rounds q to bfloat16, whatever its dtype.
      ATTENTION_MMA_ROWS(kBFloat16, kBFloat16, __nv_bfloat16, __nv_bfloat16),
      ATTENTION_MMA_ROWS(kBFloat16, kFloat16, __nv_bfloat16, __nv_bfloat16),
      ATTENTION_MMA_ROWS(kBFloat16, kFloat32, __nv_bfloat16, __nv_bfloat16),
      ATTENTION_MMA_ROWS(kFloat16, kFloat16, __half, __half),
  };
  return kRows;
}

}  // namespace tilestream::cuda
