// Attention in float32 by plain multiply-adds, for what tensor cores would round: float32 operands.
//
// A warp takes a row (token, q head) of a job at a time, and 32 of its keys: lane l has the product with key l, then all
// lanes have their columns of out. Rows of a group read the same K and V, from L1. A row's bits depend on itself alone.
// Bound by the multiply-adds and L1. Shared memory: each warp's row of q and 32 weights.
#pragma once

#include "cuda/attention_job.cuh"
#include "cuda/attention_row.h"
#include "cuda/common/reduce.cuh"

namespace tilestream::cuda {

constexpr int kFloatWarps = 4, kFloatMaxDim = 256, kFloatTileKeys = kWarpSize;

struct FloatSharedStorage {
  float q[kFloatWarps][kFloatMaxDim];
  float weights[kFloatWarps][kFloatTileKeys];
  Job job;
};

template <class KV>
__device__ __forceinline__ void run_float_row(const AttentionParams& p, const LogitRule& rule, const Job& job, int row, float* q,
                                              float* weights) {
  const int lane = threadIdx.x % kWarpSize;
  const RowView view(p, job, row);
  const KvRows k_rows = kv_rows<KV>(p, 0, job.at.kv_head, job.num_kv_heads, job.page_size);
  const KvRows v_rows = kv_rows<KV>(p, 1, job.at.kv_head, job.num_kv_heads, job.page_size);
  const int64_t token = job.token(row);
  __syncwarp();  // the row before has been used
  for (int d = lane; d < p.head_dim_qk; d += kWarpSize) q[d] = load_q(p, token, job.head(row), d, rule.q_sign);

  float max = -INFINITY, sum = 0.0f, out[kFloatMaxDim / kWarpSize] = {};
  for (int tile = view.begin / kFloatTileKeys * kFloatTileKeys; tile < view.end; tile += kFloatTileKeys) {
    __syncwarp();  // q is written; the tile before has been used
    const int key = tile + lane;
    float s = -INFINITY;
    if (view.sees(key)) {
      const char* k = k_rows.row(job.page(key), job.offset(key));
      const float2 scale = kv_scale<KV>(k_rows, job.page(key), job.offset(key));
      float dot[4] = {};  // four chains of additions: shorter waits, smaller error
      for (int d = 0; d < p.head_dim_qk; d += 4) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dot[e] = fmaf(q[d + e], kv_value<KV>(k, d + e, scale), dot[e]);
      }
      s = logit((dot[0] + dot[1]) + (dot[2] + dot[3]), rule, view.slope_log2, key - view.q_pos);
    }
    float most = fmaxf(max, s);
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, distance));
    const float finite = fmaxf(most, -kFloatMax), alpha = exp2f((max - finite) * rule.to_log2());
    const float weight = exp2f((s - finite) * rule.to_log2());
    max = most, sum = fmaf(sum, alpha, warp_sum(weight));
    weights[lane] = weight;
    __syncwarp();

    float added[kFloatMaxDim / kWarpSize] = {};
#pragma unroll 1  // lanes are enough
    for (int i = ::max(view.begin - tile, 0); i < min(view.end - tile, kFloatTileKeys); ++i) {
      const int64_t page = job.page(tile + i);
      const int offset = job.offset(tile + i);
      const char* v = v_rows.row(page, offset);
      const float2 scale = kv_scale<KV>(v_rows, page, offset);
#pragma unroll
      for (int c = 0; c < kFloatMaxDim / kWarpSize; ++c) {
        const int d = c * kWarpSize + lane;
        if (d < p.head_dim_vo) added[c] = fmaf(weights[i], kv_value<KV>(v, d, scale), added[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kFloatMaxDim / kWarpSize; ++c) out[c] = fmaf(out[c], alpha, added[c]);
  }

  const float divisor = sum == 0.0f ? 1.0f : sum;
  const float lse_log2 = sum == 0.0f ? -INFINITY : max * rule.to_log2() + log2f(sum);
  const RowWriter writer(p, job, row, lse_log2, lane == 0);
#pragma unroll
  for (int c = 0; c < kFloatMaxDim / kWarpSize; ++c) {
    const int d = c * kWarpSize + lane;
    if (d < p.head_dim_vo) writer.store(d, out[c] / divisor);
  }
}

// 4 blocks of an SM: 128 registers a thread; the compiler's own choice of 64 spills.
template <class KV>
__global__ void __launch_bounds__(kFloatWarps* kWarpSize, 4)
    attention_float_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ LogitRule rule) {
  auto& smem = dynamic_smem<FloatSharedStorage>();
  const int warp = threadIdx.x / kWarpSize;
  walk_jobs(p, smem.job, [&] {
    for (int row = warp; row < smem.job.num_rows; row += kFloatWarps)
      run_float_row<KV>(p, rule, smem.job, row, smem.q[warp], smem.weights[warp]);
  });
}

template <class KV>
void launch_attention_float(const AttentionParams& p, Stream stream) {
  constexpr unsigned kThreads = kFloatWarps * kWarpSize;
  constexpr size_t kSmemBytes = sizeof(FloatSharedStorage);
  const auto kernel = attention_float_kernel<KV>;
  const unsigned grid = resident_blocks(kernel, kThreads, kSmemBytes);
  const LaunchConfig config{.grid = grid, .block = kThreads, .smem_bytes = kSmemBytes, .stream = stream};
  launch(kernel, config, p, make_logit_rule(p));
}

}  // namespace tilestream::cuda
