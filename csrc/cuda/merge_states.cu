// Merge of attention states over disjoint key sets, in the order of the states.
//
//   out = sum_s w_s v_s / sum_s w_s,  w_s = exp(lse_s - max lse);  lse' = max + log sum_s w_s
//
// A thread takes one vector of 16 bytes of one (token, head) through all states; their lse are read by every thread of
// the row, from L1. Memory-bound: the roof is reading v once. No shared memory. States with lse = -inf are skipped, so
// that their v is never read; a lone state comes out bit for bit.
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"
#include "tilestream/attention.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) merge_states_kernel(const __grid_constant__ MergeStatesParams p) {
  const int64_t vecs_per_row = ceil_div(p.head_dim, Vec<T>::kSize);
  const int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x, row = i / vecs_per_row;
  if (row >= p.num_tokens * p.num_heads) return;
  const int64_t d = i % vecs_per_row * Vec<T>::kSize, num = p.head_dim - d;
  const int64_t first = row / p.num_heads * p.num_states * p.num_heads + row % p.num_heads;

  float most = -INFINITY;
  for (int s = 0; s < p.num_states; ++s) {
    const float lse = p.lse[first + int64_t(s) * p.num_heads];
    most = lse > most || lse != lse ? lse : most;  // a NaN is kept
  }
  float sum[Vec<T>::kSize] = {}, denominator = 0.0f;
  for (int s = 0; s < p.num_states; ++s) {
    const int64_t state = first + int64_t(s) * p.num_heads;
    const float lse = p.lse[state];
    if (lse == -INFINITY) continue;
    const float weight = expf(lse - most);
    denominator += weight;
    const Vec<T> v = load_vec<kAligned>(static_cast<const T*>(p.v) + state * p.head_dim + d, num);
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) sum[k] = fmaf(to_float(v.at[k]), weight, sum[k]);
  }
  const float divisor = denominator == 0.0f ? 1.0f : denominator;
  Vec<T> out;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) out.at[k] = from_float<T>(sum[k] / divisor);
  store_vec<kAligned>(static_cast<T*>(p.out) + row * p.head_dim + d, out, num);
  if (d == 0) p.out_lse[row] = denominator == 0.0f ? -INFINITY : most + logf(denominator);
}

}  // namespace

void merge_states(const MergeStatesParams& p, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t num_threads = p.num_tokens * p.num_heads * ceil_div(p.head_dim, Vec<T>::kSize);
    const LaunchConfig config{.grid = unsigned(ceil_div(num_threads, kBlockThreads)), .block = kBlockThreads, .stream = stream};
    const bool aligned = rows_aligned(p.v, sizeof(T), p.head_dim) && rows_aligned(p.out, sizeof(T), p.head_dim);
    if (aligned) launch(merge_states_kernel<T, true>, config, p);
    else launch(merge_states_kernel<T, false>, config, p);
  });
}

}  // namespace tilestream::cuda
