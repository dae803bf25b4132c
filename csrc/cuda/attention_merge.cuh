// Partial results to results: a warp merges the parts of one row, in the order of the plan, after the launch that wrote them or
// inside it.
#pragma once

#include "cuda/attention_job.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ptx/memory.cuh"

namespace tilestream::cuda {

// out and lse of head `in_group` of a merge's kv head. No parts: 0 and -inf, or the sink's.
__device__ __forceinline__ void merge_row(const AttentionParams& p, const PlanMerge& merge, int in_group) {
  constexpr int kColumnsPerLane = 256 / kWarpSize;
  const PlanHeader& h = p.plan.header();
  const int group_size = h.num_qo_heads / h.num_kv_heads, lane = ptx::opaque(threadIdx.x) % kWarpSize;
  const Partials partials(p);
  const int head = merge.kv_head * group_size + in_group;
  const int32_t* parts = p.plan.merge_parts() + merge.parts_begin;
  const float sink = sink_log2(p, head);
  float most = sink;
  for (int k = 0; k < merge.num_parts; ++k)
    most = larger_or_nan(most, partials.lse_log2[int64_t(parts[k]) * group_size + in_group]);

  float denominator = part_weight(sink, most), sum[kColumnsPerLane] = {};
  for (int k = 0; k < merge.num_parts; ++k) {
    const int64_t row = int64_t(parts[k]) * group_size + in_group;
    if (partials.lse_log2[row] == -INFINITY) continue;
    const float weight = part_weight(partials.lse_log2[row], most);
    denominator += weight;
#pragma unroll
    for (int c = 0; c < kColumnsPerLane; ++c) {
      const int d = c * kWarpSize + lane;
      if (d < p.head_dim_vo) sum[c] = fmaf(partials.out[row * p.head_dim_vo + d], weight, sum[c]);
    }
  }
  const float scale = p.out_scale(merge.kv_head) / (denominator == 0.0f ? 1.0f : denominator);
  const int64_t begin = merge.token * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
  for (int c = 0; c < kColumnsPerLane; ++c) {
    const int d = c * kWarpSize + lane;
    if (d < p.head_dim_vo) store_element(p.out_dtype, p.out, begin + d, sum[c] * scale);
  }
  if (lane == 0) store_lse(p, merge.token, head, most, denominator);
}

// A warp that has written the partial results of rows [row_begin, row_end) of a job, at most 32, counts them, and merges those
// whose last part this was (plan.h, merge_counters). Nobody waits: parts come in any order, and are added up in the plan's.
__device__ __forceinline__ void finish_parts(const AttentionParams& p, const Job& job, int row_begin, int row_end) {
  if (!p.merge_inside || job.at.partial_begin < 0) return;
  const int row = row_begin + int(threadIdx.x % kWarpSize);
  int merge = -1;
  bool is_last = false;
  __syncwarp();  // the rows were written by all lanes
  if (row < row_end) merge = p.plan.merge_of_row()[job.at.partial_begin + row / job.group_size];
  if (merge >= 0) {
    auto* const counter = reinterpret_cast<unsigned*>(p.plan.merge_counters()) + merge * job.group_size + row % job.group_size;
    is_last = int(ptx::atom_add_acq_rel_gpu(counter, 1)) + 1 == p.plan.merges()[merge].num_parts;
    if (is_last) *counter = 0;
  }
  for (unsigned rows = __ballot_sync(kFullMask, is_last); rows != 0; rows &= rows - 1) {
    const int source = __ffs(rows) - 1;
    merge_row(p, p.plan.merges()[__shfl_sync(kFullMask, merge, source)], (row_begin + source) % job.group_size);
  }
}

// A warp's share of the rows that see no key at all: no job writes them.
__device__ __forceinline__ void write_empty_rows(const AttentionParams& p) {
  if (!p.merge_inside) return;
  const PlanHeader& h = p.plan.header();
  for (int first = int(blockIdx.x) * kWarpSize; first < h.num_merges; first += int(gridDim.x) * kWarpSize) {
    const int mine = first + int(threadIdx.x % kWarpSize);
    const bool is_empty = mine < h.num_merges && p.plan.merges()[mine].num_parts == 0;
    for (unsigned empty = __ballot_sync(kFullMask, is_empty); empty != 0; empty &= empty - 1) {
      const PlanMerge& merge = p.plan.merges()[first + __ffs(empty) - 1];
      for (int i = 0; i < h.num_qo_heads / h.num_kv_heads; ++i) merge_row(p, merge, i);
    }
  }
}

}  // namespace tilestream::cuda
