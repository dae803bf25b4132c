// Paged attention from a plan (contract: tilestream/attention.h): the choice of a kernel, and the merge of partial results.
//
// The workers' jobs are one launch, by the first fitting row of attention_{sm90,16bit,fp8,int,float}.cu, compiled apart so that
// a build runs in parallel. The merges, a warp for each (token, q head), are a second one where that launch does not merge
// itself. Grids are what the device holds at once; blocks read how much there is to do from the plan, which lies in device
// memory: the host does not read it, and a captured graph replays with another plan.
#include "tilestream/attention.h"

#include <span>

#include "cuda/attention_merge.cuh"
#include "cuda/attention_row.h"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ AttentionParams p) {
  const PlanHeader& h = p.plan.header();
  const int group_size = h.num_qo_heads / h.num_kv_heads;
  const int64_t first = (int64_t(blockIdx.x) * kMergeThreads + threadIdx.x) / kWarpSize,
                step = int64_t(gridDim.x) * kMergeThreads / kWarpSize;
  for (int64_t i = first; i < int64_t(h.num_merges) * group_size; i += step)
    merge_row(p, p.plan.merges()[i / group_size], int(i % group_size));
}

// cp.async copies 16 bytes, of int4 rows 8.
void require_aligned(const char* name, const void* cache, DType dtype, int64_t page_stride, int64_t head_stride,
                     int64_t token_stride) {
  const int64_t stride_bytes = dtype == DType::kUInt4 ? 1 : dtype_bytes(dtype, 1), unit = dtype == DType::kUInt4 ? 8 : 16;
  if (reinterpret_cast<uintptr_t>(cache) % unit == 0 && page_stride * stride_bytes % unit == 0 &&
      head_stride * stride_bytes % unit == 0 && token_stride * stride_bytes % unit == 0)
    return;
  throw std::invalid_argument(std::string("attention: ") + name + " has rows that do not begin at a multiple of " +
                              std::to_string(unit) + " bytes: strides of page, head, token are " +
                              std::to_string(page_stride * stride_bytes) + ", " + std::to_string(head_stride * stride_bytes) +
                              ", " + std::to_string(token_stride * stride_bytes) + " bytes");
}

bool fits(const AttentionRow& row, const AttentionParams& p) {
  return row.kv_dtype == p.kv_dtype && row.q_dtype == p.q_dtype && row.max_dim_qk >= p.head_dim_qk &&
         row.max_dim_vo >= p.head_dim_vo && (row.fits == nullptr || row.fits(p));
}

}  // namespace

void attention(const AttentionParams& p, Stream stream) {
  require_strided("attention", p);
  require_aligned("k_cache", p.k_cache, p.kv_dtype, p.k_page_stride, p.k_head_stride, p.k_token_stride);
  require_aligned("v_cache", p.v_cache, p.kv_dtype, p.v_page_stride, p.v_head_stride, p.v_token_stride);
  if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0)
    throw std::invalid_argument("attention: workspace does not begin at a multiple of 16 bytes");
  for (const std::span<const AttentionRow> rows :
       {attention_rows_of_sm90_bfloat16(), attention_rows_of_sm90_float16(), attention_rows_of_sm90_fp8(),
        attention_rows_of_sm90_int(), attention_rows_of_16bit(), attention_rows_of_fp8(), attention_rows_of_int(),
        attention_rows_of_float()}) {
    for (const AttentionRow& row : rows) {
      if (!fits(row, p)) continue;
      row.launch(p, stream);
      if (row.merges && p.merge_inside) return;
      const unsigned grid = resident_blocks(merge_kernel, kMergeThreads, 0);
      launch(merge_kernel, {.grid = grid, .block = kMergeThreads, .stream = stream}, p);
      return;
    }
  }
  throw std::invalid_argument("attention: no CUDA kernel for q dtype " + std::to_string(int(p.q_dtype)) + ", cache dtype " +
                              std::to_string(int(p.kv_dtype)) + ", head dims " + std::to_string(p.head_dim_qk) + " and " +
                              std::to_string(p.head_dim_vo) + "; allowed: head dims up to 256");
}

}  // namespace tilestream::cuda
