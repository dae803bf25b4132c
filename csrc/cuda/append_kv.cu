// Rotary embedding of q and k, quantisation, the write into a paged cache, and key statistics.
//
// A warp takes one row: a q head (rotated in place), or K or V of one (token, kv head). Lane l holds elements
// 64 j + 2 l and the one behind, j < 4; a rotated element's partner is read again from L1. All arithmetic is float32.
// Memory-bound: each input is read once, each output written once. No shared memory.
//
// Key statistics are shared by the tokens of a page. A token at offset 0 starts its page's with its own values; a second
// launch then adds the other tokens by atomic minimum and maximum, whose order does not matter.
// Limits: head_dim a multiple of 16, at most 256 (api/kv_cache.h checks it).
#include "tilestream/append_kv.h"

#include "cuda/common/kv_cache.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256, kRowsPerBlock = kBlockThreads / kWarpSize;
constexpr int kPairs = 4;  // of elements, per lane: head_dim up to 256

// A lane's elements of a row. Elements past head_dim are 0.
struct Row {
  float2 at[kPairs];
  __device__ static __forceinline__ int index(int j) { return j * 2 * kWarpSize + threadIdx.x % kWarpSize * 2; }
};

template <class T>
__device__ __forceinline__ Row load_row(const T* x, int head_dim) {
  Row row;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = Row::index(j);
    row.at[j] = d < head_dim ? float2{to_float(x[d]), to_float(x[d + 1])} : float2{0.0f, 0.0f};
  }
  return row;
}

template <class T>
__device__ __forceinline__ void store_row(T* x, const Row& row, int head_dim) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = Row::index(j);
    if (d < head_dim) x[d] = from_float<T>(row.at[j].x), x[d + 1] = from_float<T>(row.at[j].y);
  }
}

// x of a pair (a, b) at angle i: a cos - b sin for a itself, b cos + a sin for b.
template <class T>
__device__ __forceinline__ float rotated(const AppendKvParams& p, const T* x, const float* cos, int d, float value) {
  const int half = p.rotary_dim / 2;
  if (d >= p.rotary_dim) return value;
  const bool is_a = p.interleaved ? d % 2 == 0 : d < half;
  const int i = p.interleaved ? d / 2 : d % half, partner = p.interleaved ? d ^ 1 : is_a ? d + half : d - half;
  const float sine = cos[half + i] * to_float(x[partner]);
  return is_a ? value * cos[i] - sine : value * cos[i] + sine;
}

// Row `x` of this token, rotated if it has to be.
template <class T>
__device__ __forceinline__ Row load_rotated(const AppendKvParams& p, const T* x, int64_t token) {
  Row row = load_row(x, p.head_dim_qk);
  if (p.cos_sin == nullptr) return row;
  const float* cos = p.cos_sin + int64_t(p.positions[token]) * p.rotary_dim;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = Row::index(j);
    row.at[j] = {rotated(p, x, cos, d, row.at[j].x), rotated(p, x, cos, d + 1, row.at[j].y)};
  }
  return row;
}

template <class F>
__device__ __forceinline__ float warp_reduce(float v, F f) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) v = f(v, __shfl_xor_sync(kFullMask, v, distance));
  return v;
}

// value = q * scale + zero with scale and zero as float16 keeps them. A NaN or an infinity in the row makes scale NaN.
template <class KV>
__device__ __forceinline__ void store_quantised(char* to, __half2* scales, const Row& row, int head_dim) {
  constexpr float kMost = float((1 << kKvBits<KV>) - 1);
  float low = INFINITY, high = -INFINITY, check = 0.0f;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    check += row.at[j].x * 0.0f + row.at[j].y * 0.0f;
    if (Row::index(j) >= head_dim) continue;
    low = fminf(low, fminf(row.at[j].x, row.at[j].y));
    high = fmaxf(high, fmaxf(row.at[j].x, row.at[j].y));
  }
  low = warp_reduce(low, [](float a, float b) { return fminf(a, b); });
  high = warp_reduce(high, [](float a, float b) { return fmaxf(a, b); });
  const __half2 stored = __floats2half2_rn((high - low) / kMost + warp_sum(check), low);
  const float2 scale = __half22float2(stored);
  if (threadIdx.x % kWarpSize == 0) *scales = stored;
  const float divisor = scale.x > 0.0f ? scale.x : 1.0f;
  const auto quantise = [&](float x) { return uint8_t(fminf(fmaxf(rintf((x - scale.y) / divisor), 0.0f), kMost)); };
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = Row::index(j);
    if (d >= head_dim) continue;
    const uint8_t x = quantise(row.at[j].x), y = quantise(row.at[j].y);
    if constexpr (kKvBits<KV> == 4) to[d / 2] = char(x | y << 4);
    else to[d] = char(x), to[d + 1] = char(y);
  }
}

__device__ __forceinline__ Row divided(Row row, float scale) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) row.at[j].x /= scale, row.at[j].y /= scale;
  return row;
}

template <class KV>
__device__ __forceinline__ void store_kv(const AppendKvParams& p, int side, int head, int64_t slot, const Row& row) {
  const KvRows rows = kv_rows<KV>(p, side, head, p.num_kv_heads, p.page_size);
  const int64_t page = slot / p.page_size;
  const int offset = int(slot % p.page_size), head_dim = side == 0 ? p.head_dim_qk : p.head_dim_vo;
  char* const to = rows.row(page, offset);
  if constexpr (kIsQuantised<KV>) {
    store_quantised<KV>(to, const_cast<__half2*>(rows.scale(page, offset)), row, head_dim);
  } else {
    constexpr bool kIsScaled = std::is_same_v<KV, __nv_fp8_e4m3>;
    store_row(reinterpret_cast<KV*>(to), kIsScaled ? divided(row, side == 0 ? p.k_scale : p.v_scale) : row, head_dim);
  }
}

// [2 (min, max), head_dim_qk] of the page and head.
__device__ __forceinline__ float* stats_of(const AppendKvParams& p, int64_t slot, int head) {
  return p.key_stats + (slot / p.page_size * p.num_kv_heads + head) * 2 * p.head_dim_qk;
}

// Rows of a token: q heads, then K heads, then V heads.
template <class T, class KV>
__global__ void __launch_bounds__(kBlockThreads) append_kv_kernel(const __grid_constant__ AppendKvParams p, int num_q_rows) {
  const int rows_per_token = num_q_rows + 2 * p.num_kv_heads;
  const int64_t warp = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize, token = warp / rows_per_token;
  if (token >= p.num_tokens) return;
  int head = int(warp % rows_per_token);
  if (head < num_q_rows) {
    T* const q = static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    const Row row = load_rotated(p, q, token);
    __syncwarp();  // every partner has been read
    store_row(q, row, p.head_dim_qk);
    return;
  }
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  head -= num_q_rows;
  if (head < p.num_kv_heads) {
    const Row row = load_rotated(p, static_cast<const T*>(p.k) + token * p.k_in_token_stride + head * p.k_in_head_stride, token);
    store_kv<KV>(p, 0, head, slot, row);
    if (p.key_stats == nullptr || slot % p.page_size != 0) return;
    float* const stats = stats_of(p, slot, head);
    store_row(stats, row, p.head_dim_qk);
    store_row(stats + p.head_dim_qk, row, p.head_dim_qk);
  } else {
    head -= p.num_kv_heads;
    const T* const v = static_cast<const T*>(p.v) + token * p.v_in_token_stride + head * p.v_in_head_stride;
    store_kv<KV>(p, 1, head, slot, load_row(v, p.head_dim_vo));
  }
}

// Floats of one sign are ordered as their bits; adding 0 makes -0 the +0 that this needs.
__device__ __forceinline__ void atomic_min(float* p, float v) {
  v += 0.0f;
  if (v >= 0.0f) atomicMin(reinterpret_cast<int*>(p), __float_as_int(v));
  else atomicMax(reinterpret_cast<unsigned*>(p), __float_as_uint(v));
}
__device__ __forceinline__ void atomic_max(float* p, float v) {
  v += 0.0f;
  if (v >= 0.0f) atomicMax(reinterpret_cast<int*>(p), __float_as_int(v));
  else atomicMin(reinterpret_cast<unsigned*>(p), __float_as_uint(v));
}

// Tokens that are not the first of their page.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) key_stats_kernel(const __grid_constant__ AppendKvParams p) {
  const int64_t warp = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize, token = warp / p.num_kv_heads;
  if (token >= p.num_tokens) return;
  const int head = int(warp % p.num_kv_heads);
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0 || slot % p.page_size == 0) return;
  const Row row = load_rotated(p, static_cast<const T*>(p.k) + token * p.k_in_token_stride + head * p.k_in_head_stride, token);
  float* const low = stats_of(p, slot, head);
  float* const high = low + p.head_dim_qk;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = Row::index(j);
    if (d >= p.head_dim_qk) continue;
    atomic_min(low + d, row.at[j].x), atomic_min(low + d + 1, row.at[j].y);
    atomic_max(high + d, row.at[j].x), atomic_max(high + d + 1, row.at[j].y);
  }
}

LaunchConfig config_of(int64_t num_rows, Stream stream) {
  return {.grid = unsigned(ceil_div(num_rows, kRowsPerBlock)), .block = kBlockThreads, .stream = stream};
}

}  // namespace

void append_kv(const AppendKvParams& p, Stream stream) {
  require_strided("append_kv", p);
  with_element(p.x_dtype, [&](auto element) {
    using T = decltype(element);
    const int num_q_rows = p.q != nullptr && p.cos_sin != nullptr ? p.num_qo_heads : 0;
    with_kv(p.kv_dtype, [&](auto kv) {
      launch(append_kv_kernel<T, decltype(kv)>, config_of(p.num_tokens * (num_q_rows + 2 * p.num_kv_heads), stream), p, num_q_rows);
    });
    if (p.key_stats != nullptr) launch(key_stats_kernel<T>, config_of(p.num_tokens * p.num_kv_heads, stream), p);
  });
}

}  // namespace tilestream::cuda
