// Attention on tensor cores: tiles of up to 128 rows (tokens x q heads of one kv head) by kTileKeys keys.
//
// A block of 4 warps is a worker (or several, if the plan has more workers than the device holds blocks): it
// walks the worker's jobs, of a job the row tiles, and of a row tile the key tiles, whose K and V a ring of
// copies brings (attention_pipe.cuh). How the warps divide a row tile among them: attention_rows.cuh.
//   scores = q . K^T (mma m16n8k16), an online-softmax step in base 2, out = alpha * out + P . V
// A row's bits depend on its own q, its job's keys and its mask, and on nothing else: tiles begin at
// multiples of kTileKeys, and a tile in which a row sees no key leaves its state as it was.
//
// Decode is bound by reading K and V. All slots of a block's ring but one are under way: with head_dim 128
// 40 KB of 16-bit K and V, 16 KB of int8, 20 KB of int4. Registers and shared memory let an SM hold two such
// blocks, of quantised caches three: 80, 48 and 60 KB in flight, where an H200 needs about 30 (4.8 TB/s, 132
// SMs, 0.8 us). int8 and int4 also pay for unpacking: 2.5 and 2.9 instructions a value.
// Prefill is bound by mma, and next by ldmatrix: 16-bit caches with head_dim up to 128 take 128 rows, two
// fragments a warp, which share what is read of K and V; others take 64. Shared memory with head_dim 128:
// 81 KB (quantised: 58), so that an A100 holds two blocks too; never more than the 99 KB of sm_86 and sm_89.
// Source: FlashAttention-2 (2307.08691), online softmax (1805.02867), FlashDecoding++ (2311.01282).
#pragma once

#include "cuda/attention_pipe.cuh"
#include "cuda/attention_row.h"
#include "cuda/attention_rows.cuh"

namespace tilestream::cuda {

__device__ __forceinline__ Floats8 load_e4m3(const void* p, int64_t begin, bool is_aligned) {
  const auto stored = load_eight(static_cast<const __nv_fp8_e4m3*>(p) + begin, is_aligned);
  Floats8 floats;
#pragma unroll
  for (int k = 0; k < 8; ++k) floats.at[k] = to_float(stored.at[k]);
  return floats;
}

// Rows row_begin .. row_begin + num_rows of the job as T, times `factor`; those past its end are its last row.
template <class C>
__device__ __forceinline__ void load_q_tile(const AttentionParams& p, const Job& job, float factor,
                                            int row_begin, int num_rows, typename C::T* q) {
  const int chunks = p.head_dim_qk / 8;
  const bool is_aligned = rows_aligned(p.q, dtype_bytes(p.q_dtype, 1), p.q_token_stride, p.q_head_stride);
  for (int i = threadIdx.x; i < num_rows * chunks; i += C::kThreads) {
    const int r = i / chunks, chunk = i % chunks, row = min(row_begin + r, job.num_rows - 1);
    const int64_t at = job.token(row) * p.q_token_stride + job.head(row) * p.q_head_stride + chunk * 8;
    Floats8 values;
    if (p.q_dtype == DType::kBFloat16) values = load_floats<__nv_bfloat16>(p.q, at, is_aligned);
    else if (p.q_dtype == DType::kFloat16) values = load_floats<__half>(p.q, at, is_aligned);
    else if (p.q_dtype == DType::kFloat32) values = load_floats<float>(p.q, at, is_aligned);
    else values = load_e4m3(p.q, at, is_aligned);
    Vec<typename C::T> packed;
#pragma unroll
    for (int k = 0; k < 8; ++k) packed.at[k] = from_float<typename C::T>(values.at[k] * factor);
    *reinterpret_cast<Vec<typename C::T>*>(chunk_at<C::kMaxDim>(q, r, chunk)) = packed;
  }
}

// A row tile's results to global memory.
template <class C>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Job& job, int row_begin,
                                           int num_rows, const typename SharedStorage<C>::Rows& rows) {
  const int chunks = p.head_dim_vo / 8;
  for (int i = threadIdx.x; i < min(num_rows, job.num_rows - row_begin) * chunks; i += C::kThreads) {
    const int r = i / chunks, chunk = i % chunks;
    const RowWriter writer(p, job, row_begin + r, rows.lse_log2[r], chunk == 0);
    writer.store_8(chunk * 8, load_floats<float>(rows.out[r], chunk * 8, true));
  }
}

// False: the unified maximum did not suit the rows, and nothing was written.
template <class C, int kFragments, bool kShared>
__device__ __forceinline__ bool run_row_tile(const AttentionParams& p, const LogitRule& rule, int row_begin,
                                             bool unified, SharedStorage<C>& smem) {
  constexpr int kRows = kShared ? kFragmentRows : kFragmentRows * C::kWarps * kFragments;
  const Job& job = smem.job;
  const int last_row = min(row_begin + kRows, job.num_rows) - 1;
  const int begin = job.keys_begin(row_begin) / C::kTileKeys * C::kTileKeys, end = job.keys_end(last_row);
  __syncthreads();  // nobody reads the results before any more
  KvPipe<C> pipe(p, job, begin, end, smem.tiles);
  load_q_tile<C>(p, job, rule.q_sign * p.score_descale(job.at.kv_head), row_begin, kRows, smem.tiles.q);
  WarpRows<C, kFragments, kShared> rows(p, rule, row_begin, unified, smem);
  if constexpr (kShared) {
    __syncthreads();
    rows.keep_q();
  }
  for (int tile = begin; tile < end; tile += C::kTileKeys) {
    typename WarpRows<C, kFragments, kShared>::Weights weights;
    const bool sees = rows.sees(tile);
    typename C::T* const k = pipe.template next<0>();
    if (sees) rows.attend_keys(k, tile, weights);
    typename C::T* const v = pipe.template next<1>();
    if (sees) rows.attend_values(v, weights);
  }
  if constexpr (kShared) {
    if (unified && !rows.in_range()) return false;
  }
  __syncthreads();  // nobody reads the tiles any more
  rows.write();
  __syncthreads();
  store_rows<C>(p, job, row_begin, kRows, smem.rows);
  return true;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    attention_mma_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ LogitRule rule) {
  auto& smem = dynamic_smem<SharedStorage<C>>();
  const Job& job = smem.job;
  walk_jobs(p, smem.job, [&] {
    for (int row = 0; row < job.num_rows; row += C::kRows) {
      const int num_rows = job.num_rows - row;
      if (num_rows <= kFragmentRows) {
        // A row's bits may not depend on how many tokens its job has; the other ways below do not take the
        // unified maximum.
        bool unified = p.unified_max == p.unified_max && p.plan.header().mode == int(PlanMode::kBalanced);
        while (!run_row_tile<C, 1, true>(p, rule, row, unified, smem)) unified = false;
      } else if (C::kFragments == 1 || num_rows <= kFragmentRows * C::kWarps) {
        run_row_tile<C, 1, false>(p, rule, row, false, smem);
      } else {
        run_row_tile<C, C::kFragments, false>(p, rule, row, false, smem);
      }
    }
  });
}

template <class T, class KV, int kMaxDim>
void launch_attention_mma(const AttentionParams& p, Stream stream) {
  using C = MmaConfig<T, KV, kMaxDim>;
  constexpr size_t kSmemBytes = sizeof(SharedStorage<C>);
  static_assert(kSmemBytes <= 99 * 1024, "more than sm_86 and sm_89 have");
  const auto kernel = attention_mma_kernel<C>;
  const unsigned grid = resident_blocks(kernel, C::kThreads, kSmemBytes);
  const LaunchConfig config{.grid = grid, .block = C::kThreads, .smem_bytes = kSmemBytes, .stream = stream};
  launch(kernel, config, p, make_logit_rule(p));
}

// Rows for one pair of dtypes. T: element of the products.
#define ATTENTION_MMA_ROWS(kv, q, T, KV)                              \
  {DType::kv, DType::q, 64, 64, launch_attention_mma<T, KV, 64>},     \
  {DType::kv, DType::q, 128, 128, launch_attention_mma<T, KV, 128>},  \
  {DType::kv, DType::q, 256, 256, launch_attention_mma<T, KV, 256>}

}  // namespace tilestream::cuda
