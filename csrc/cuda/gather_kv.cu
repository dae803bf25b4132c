// Rows of a cache of any dtype as plain float32: what append_kv wrote, read back.
//
// A warp takes one row of K or V of one (token, kv head), a lane 8 neighbours. Memory-bound.
#include "cuda/common/kv_cache.cuh"
#include "cuda/common/reduce.cuh"
#include "tilestream/append_kv.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

// 8 values as a cache of type KV stores them.
template <class KV>
struct alignas(kKvBits<KV> < 16 ? kKvBits<KV> : 16) StoredEight {
  char at[kKvBits<KV>];
};

// aligned: 8 neighbours are loaded, and stored, at once.
template <class KV>
__global__ void __launch_bounds__(kBlockThreads)
    gather_kv_kernel(const __grid_constant__ GatherKvParams p, bool aligned) {
  const int64_t row = int64_t(blockIdx.x) * (kBlockThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= p.num_tokens * p.num_kv_heads * 2) return;
  const int side = int(row % 2), head = int(row / 2 % p.num_kv_heads);
  const int64_t slot = p.slot_mapping[row / 2 / p.num_kv_heads], page = slot / p.page_size;
  const int offset = int(slot % p.page_size), head_dim = side == 0 ? p.head_dim_qk : p.head_dim_vo;

  const int d = int(threadIdx.x) % kWarpSize * 8;
  if (d >= head_dim) return;

  const KvRows rows = kv_rows<KV>(p, side, head, p.num_kv_heads, p.page_size);
  const float2 scale = kv_scale<KV>(rows, page, offset);
  const char* const from = rows.row(page, offset) + d * kKvBits<KV> / 8;
  StoredEight<KV> stored;
  if (aligned) {
    stored = *reinterpret_cast<const StoredEight<KV>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kKvBits<KV>; ++i) stored.at[i] = from[i];
  }
  const float side_scale = side == 0 ? p.k_scale : p.v_scale;  // 1 but for e4m3
  Eight<float> values;
#pragma unroll
  for (int i = 0; i < 8; ++i) values.at[i] = kv_value<KV>(stored.at, i, scale) * side_scale;
  store_eight((side == 0 ? p.k : p.v) + row / 2 * head_dim + d, values, aligned);
}

}  // namespace

void gather_kv(const GatherKvParams& p, Stream stream) {
  require_strided("gather_kv", p);
  with_kv(p.kv_dtype, [&](auto kv) {
    const int64_t num_rows = p.num_tokens * p.num_kv_heads * 2;
    const bool aligned = cache_aligned<decltype(kv)>(p) && rows_aligned(p.k, sizeof(float), p.head_dim_qk) &&
                         rows_aligned(p.v, sizeof(float), p.head_dim_vo);
    launch(gather_kv_kernel<decltype(kv)>,
           {.grid = unsigned(ceil_div(num_rows, kBlockThreads / kWarpSize)),
            .block = kBlockThreads,
            .stream = stream},
           p, aligned);
  });
}

}  // namespace tilestream::cuda
