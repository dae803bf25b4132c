// Rows of a cache of any dtype as plain float32: what append_kv wrote, read back.
//
// A warp takes one row of K or V of one (token, kv head). Memory-bound; no shared memory.
#include "cuda/common/kv_cache.cuh"
#include "cuda/common/reduce.cuh"
#include "tilestream/append_kv.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

template <class KV>
__global__ void __launch_bounds__(kBlockThreads) gather_kv_kernel(const __grid_constant__ GatherKvParams p) {
  const int64_t row = int64_t(blockIdx.x) * (kBlockThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= p.num_tokens * p.num_kv_heads * 2) return;
  const int side = int(row % 2), head = int(row / 2 % p.num_kv_heads);
  const int64_t slot = p.slot_mapping[row / 2 / p.num_kv_heads], page = slot / p.page_size;
  const int offset = int(slot % p.page_size), head_dim = side == 0 ? p.head_dim_qk : p.head_dim_vo;

  const KvRows rows = kv_rows<KV>(p, side, head, p.num_kv_heads, p.page_size);
  const float2 scale = kv_scale<KV>(rows, page, offset);
  float* const out = (side == 0 ? p.k : p.v) + row / 2 * head_dim;
  const float side_scale = side == 0 ? p.k_scale : p.v_scale;  // 1 but for e4m3
  for (int d = threadIdx.x % kWarpSize; d < head_dim; d += kWarpSize)
    out[d] = kv_value<KV>(rows.row(page, offset), d, scale) * side_scale;
}

}  // namespace

void gather_kv(const GatherKvParams& p, Stream stream) {
  require_strided("gather_kv", p);
  with_kv(p.kv_dtype, [&](auto kv) {
    const int64_t num_rows = p.num_tokens * p.num_kv_heads * 2;
    launch(gather_kv_kernel<decltype(kv)>,
           {.grid = unsigned(ceil_div(num_rows, kBlockThreads / kWarpSize)), .block = kBlockThreads, .stream = stream}, p);
  });
}

}  // namespace tilestream::cuda
