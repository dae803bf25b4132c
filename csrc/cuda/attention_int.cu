// Attention kernels: caches of int8 and int4 with q of 16 bits.
#include "cuda/attention_mma.cuh"

namespace tilestream::cuda {

std::span<const AttentionRow> attention_rows_of_int() {
  static constexpr AttentionRow kRows[] = {
      ATTENTION_MMA_ROWS(kUInt8, kBFloat16, __nv_bfloat16, Int8),
      ATTENTION_MMA_ROWS(kUInt8, kFloat16, __half, Int8),
      ATTENTION_MMA_ROWS(kUInt4, kBFloat16, __nv_bfloat16, Int4),
      ATTENTION_MMA_ROWS(kUInt4, kFloat16, __half, Int4),
  };
  return kRows;
}

}  // namespace tilestream::cuda
