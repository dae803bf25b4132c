// Rotary embedding of q and k, quantisation, the write into a paged cache, and key statistics, in one launch.
// Keys that are rounded with feedback are written by a second, further down.
//
// 2 to 32 lanes take one row of a token: a q head (rotated in place), K or V. A lane holds 8 neighbours, loaded
// and stored by 16 bytes; those that a rotation pairs them with, and the angles, come from L1. All arithmetic
// is float32. Memory-bound: each input is read once, each output written once; at 48 registers 5 blocks share
// an SM and have 20 KB of loads under way. No shared memory.
//
// Key statistics are shared by the tokens of a page. A run of tokens with consecutive slots in one page goes
// to the lanes of its first token, which keep minima and maxima in registers and write them once: plainly if
// the run starts the page, else by atomics, whose order does not matter.
// Limits: head_dim a multiple of 16, at most 256 (api/kv_cache.h checks it).
#include "tilestream/append_kv.h"

#include "cuda/common/kv_cache.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

// The lanes that share a row, and where this one stands among them.
struct Lanes {
  int num, d;     // a power of two; this lane's first element
  unsigned mask;  // of the warp
  __device__ __forceinline__ explicit Lanes(int num)
      : num(num), d((int(threadIdx.x) & (num - 1)) * 8),
        mask((kFullMask >> (kWarpSize - num)) << (threadIdx.x % kWarpSize & -num)) {}

  template <class F>
  __device__ __forceinline__ float reduce(float v, F f) const {
    for (int distance = num / 2; distance > 0; distance /= 2) v = f(v, __shfl_xor_sync(mask, v, distance));
    return v;
  }
};

struct Values { float at[8]; };

template <class T>
__device__ __forceinline__ Values to_values(const Eight<T>& x) {
  Values v;
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = to_float(x.at[i]);
  return v;
}
template <class T>
__device__ __forceinline__ Eight<T> from_values(const Values& v) {
  Eight<T> x;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.at[i] = from_float<T>(v.at[i]);
  return x;
}

// ---- rotary embedding -----------------------------------------------------------------------------

// An element that is rotated: x cos + partner sin. An fma by name: the same bits wherever it is inlined.
__device__ __forceinline__ float turned(float x, float partner, float cos, float sin) {
  return fmaf(x, cos, partner * sin);
}

// Element e of a row, `partner` being element partner_of(p, e), and `angles` the token's of cos_sin.
__device__ __forceinline__ float turned(const AppendKvParams& p, const float* angles, int e, float x,
                                        float partner) {
  const int half = p.rotary_dim / 2, angle = p.interleaved ? e / 2 : e < half ? e : e - half;
  const bool first = p.interleaved ? e % 2 == 0 : e < half;
  const float sine = angles[half + angle];
  return turned(x, partner, angles[angle], first ? -sine : sine);
}
__device__ __forceinline__ int partner_of(const AppendKvParams& p, int e) {
  const int half = p.rotary_dim / 2;
  return p.interleaved ? e ^ 1 : e < half ? e + half : e - half;
}

// The lane's elements of row `x`, rotated if they have to be.
template <class T>
__device__ __forceinline__ Values load_rotated(const AppendKvParams& p, const T* x, int64_t token, int d,
                                               bool aligned) {
  Values v{}, partner{}, cos{}, sin{};
  if (d >= p.head_dim_qk) return v;
  v = to_values(load_eight(x + d, aligned));
  if (p.cos_sin == nullptr || d >= p.rotary_dim) return v;
  const int half = p.rotary_dim / 2;
  const float* const angles = p.cos_sin + int64_t(p.positions[token]) * p.rotary_dim;
  if (aligned && !p.interleaved) {
    const bool first = d < half;
    partner = to_values(load_eight(x + (first ? d + half : d - half), true));
    cos = to_values(load_eight(angles + (first ? d : d - half), true));
    sin = to_values(load_eight(angles + (first ? d + half : d), true));
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v.at[i] = turned(v.at[i], partner.at[i], cos.at[i], first ? -sin.at[i] : sin.at[i]);
    return v;
  }
  const Values own = v;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int e = d + i;
    if (e >= p.rotary_dim) break;
    v.at[i] = turned(p, angles, e, own.at[i], p.interleaved ? own.at[i ^ 1] : to_float(x[partner_of(p, e)]));
  }
  return v;
}

// ---- the cache ------------------------------------------------------------------------------------

// (scale, zero) of a row whose codes are 0 to `most`, from what each of its lanes has: the least element, the
// greatest, and the sum of x * 0, by which a NaN or an infinity makes scale NaN.
__device__ __forceinline__ __half2 row_scale(const Lanes& lanes, float low, float high, float check,
                                             float most) {
  low = lanes.reduce(low, [](float a, float b) { return fminf(a, b); });
  high = lanes.reduce(high, [](float a, float b) { return fmaxf(a, b); });
  check = lanes.reduce(check, [](float a, float b) { return a + b; });
  return __floats2half2_rn((high - low) / most + check, low);
}

// Eight 4-bit values, to 4 bytes.
__device__ __forceinline__ void store_nibbles(uint8_t* to, const Eight<uint8_t>& q, bool aligned) {
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) word |= unsigned(q.at[i]) << 4 * i;
  if (aligned) {
    *reinterpret_cast<unsigned*>(to) = word;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = uint8_t(word >> 8 * i);
  }
}

// value = q * scale + zero with scale and zero as float16 keeps them. All of the row's lanes take part; those
// past its end are not `inside`.
template <class KV>
__device__ __forceinline__ void store_quantised(char* to, __half2* scales, const Values& v,
                                                const Lanes& lanes, bool inside, bool aligned) {
  constexpr float kMost = float((1 << kKvBits<KV>) - 1);
  float low = INFINITY, high = -INFINITY, check = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!inside) break;
    check += v.at[i] * 0.0f;
    low = fminf(low, v.at[i]);
    high = fmaxf(high, v.at[i]);
  }
  const __half2 stored = row_scale(lanes, low, high, check, kMost);
  if (!inside) return;
  const float2 scale = __half22float2(stored);
  if (lanes.d == 0) *scales = stored;
  const float divisor = scale.x > 0.0f ? scale.x : 1.0f;
  Eight<uint8_t> q;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    q.at[i] = uint8_t(fminf(fmaxf(rintf((v.at[i] - scale.y) / divisor), 0.0f), kMost));
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(to) + lanes.d * kKvBits<KV> / 8;
  if constexpr (kKvBits<KV> == 8) store_eight(bytes, q, aligned);
  else store_nibbles(bytes, q, aligned);
}

__device__ __forceinline__ Values divided(Values v, float scale) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] /= scale;
  return v;
}

template <class KV>
__device__ __forceinline__ void store_kv(const AppendKvParams& p, int side, int head, int slot,
                                         const Values& v, const Lanes& lanes, bool aligned) {
  const KvRows rows = kv_rows<KV>(p, side, head, p.num_kv_heads, p.page_size);
  const int page = slot / p.page_size, offset = slot % p.page_size;
  const bool inside = lanes.d < (side == 0 ? p.head_dim_qk : p.head_dim_vo);
  char* const to = rows.row(page, offset);
  if constexpr (kIsQuantised<KV>) {
    store_quantised<KV>(to, const_cast<__half2*>(rows.scale(page, offset)), v, lanes, inside, aligned);
  } else if (inside) {
    constexpr bool kIsScaled = std::is_same_v<KV, __nv_fp8_e4m3>;
    const Values stored = kIsScaled ? divided(v, side == 0 ? p.k_scale : p.v_scale) : v;
    store_eight(reinterpret_cast<KV*>(to) + lanes.d, from_values<KV>(stored), aligned);
  }
}

// ---- key statistics -------------------------------------------------------------------------------

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

// Of a run of keys whose first has this slot.
__device__ __forceinline__ void store_stats(const AppendKvParams& p, int slot, int head, int d,
                                            const Values& low, const Values& high) {
  float* const to =
      p.key_stats + (int64_t(slot / p.page_size) * p.num_kv_heads + head) * 2 * p.head_dim_qk + d;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (slot % p.page_size == 0) {
      to[i] = low.at[i], to[p.head_dim_qk + i] = high.at[i];
    } else {
      atomic_min(to + i, low.at[i]);
      atomic_max(to + p.head_dim_qk + i, high.at[i]);
    }
  }
}

// Whether token's slot is the one behind that of the token before it, in the same page.
__device__ __forceinline__ bool continues_run(const AppendKvParams& p, int64_t token) {
  const int slot = p.slot_mapping[token];
  return token > 0 && slot % p.page_size != 0 && p.slot_mapping[token - 1] == slot - 1;
}

// ---- the kernel of all else -----------------------------------------------------------------------

// K of one head: this token's, or with statistics those of the run that it starts.
template <class T, class KV, bool kStats>
__device__ __forceinline__ void append_keys(const AppendKvParams& p, int64_t token, int head,
                                            const Lanes& lanes, bool aligned) {
  const int slot = p.slot_mapping[token];
  Values low, high;
#pragma unroll 1
  for (int64_t t = token; t == token || (kStats && t < p.num_tokens && continues_run(p, t)); ++t) {
    const T* const k = static_cast<const T*>(p.k) + t * p.k_in_token_stride + head * p.k_in_head_stride;
    const Values key = load_rotated(p, k, t, lanes.d, aligned);
    if (p.key_feedback == nullptr)
      store_kv<KV>(p, 0, head, slot + int(t - token), key, lanes, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low.at[i] = t == token ? key.at[i] : fminf(low.at[i], key.at[i]);
      high.at[i] = t == token ? key.at[i] : fmaxf(high.at[i], key.at[i]);
    }
  }
  if (kStats && lanes.d < p.head_dim_qk) store_stats(p, slot, head, lanes.d, low, high);
}

// Rows of a token: q heads, then K heads, then V heads. `aligned`: every vector of 8 elements is, and lies on
// one side of rotary_dim and of its half.
template <class T, class KV, bool kStats>
__global__ void __launch_bounds__(kBlockThreads, kStats ? 3 : 5)
append_kv_kernel(const __grid_constant__ AppendKvParams p, int num_q_rows, int lanes_per_row, bool aligned) {
  const Lanes lanes(lanes_per_row);
  const int64_t token = blockIdx.x;
  int head = int(blockIdx.y * blockDim.x + threadIdx.x) / lanes.num;
  if (head >= num_q_rows + 2 * p.num_kv_heads) return;
  if (head < num_q_rows) {
    T* const q = static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    const Values v = load_rotated(p, q, token, lanes.d, aligned);
    __syncwarp(lanes.mask);  // every partner has been read
    if (lanes.d < p.head_dim_qk) store_eight(q + lanes.d, from_values<T>(v), aligned);
    return;
  }
  const int slot = p.slot_mapping[token];
  if (slot < 0) return;
  head -= num_q_rows;
  if (head < p.num_kv_heads) {
    if (!kStats && p.key_feedback != nullptr) return;  // append_rounded_keys_kernel has it
    if (kStats && continues_run(p, token)) return;     // another token's lanes have it
    return append_keys<T, KV, kStats>(p, token, head, lanes, aligned);
  }
  head -= p.num_kv_heads;
  const T* const v =
      static_cast<const T*>(p.v) + token * p.v_in_token_stride + head * p.v_in_head_stride + lanes.d;
  const Values values = lanes.d < p.head_dim_vo ? to_values(load_eight(v, aligned)) : Values{};
  store_kv<KV>(p, 1, head, slot, values, lanes, aligned);
}

// ---- keys rounded with feedback -------------------------------------------------------------------
//
// Half a warp takes a key, a block of threads 8 tokens' keys of one head. What an element makes up for is
// known only when all those ahead of it are rounded: a chain of head_dim steps. It goes by 16 positions of
// the order, one to a lane: from its element the lane takes what the errors so far ask for, an fma each, all
// lanes at once; then the 16 are rounded in turn, each error going by a shuffle to the lanes behind. The 16
// columns of feedback that this needs are copied to shared memory during the 16 before, once for the 8 keys;
// only what lies above the diagonal is used. A NaN or an infinity makes the key's scale NaN, and no other key
// sees it. Any alignment will do; feedback is copied by 16 bytes where it has theirs.
// Shared memory: 25 KB for head_dim up to 128, else 50 KB. 40 registers.
//
// Cost, ESTIMATED from the instructions, measured nowhere: a step of the chain is 11 arithmetic instructions
// and a shuffle, some 70 cycles. Decode: bound by that latency, about 7 us a layer at head_dim 128 (5 of them
// the chain) however many the requests, until the SMs are full. Prefill: bound by issue slots, some 1500 a
// key, 2 to 3% of a layer.

constexpr int kRoundedLanes = 16, kRoundedKeys = 8, kRoundedThreads = kRoundedLanes * kRoundedKeys;

template <int kMostDim>
struct RoundedStorage {
  struct Key {
    float x[kMostDim];         // by element: what is to be rounded, then its code
    float errors[kMostDim];    // by position
    float pad[kRoundedLanes];  // a warp's two keys lie in different banks
  };
  float feedback[2][kMostDim][kRoundedLanes];  // in turns: [position ahead][of the 16 positions]
  Key keys[kRoundedKeys];
  int order[kMostDim];
};

// Starts the copy of columns `begin` to begin + 15 of the head's feedback, as far down as they are used.
__device__ __forceinline__ void copy_feedback(const AppendKvParams& p, int head, int begin,
                                              float (*to)[kRoundedLanes]) {
  const float* const from = p.key_feedback + int64_t(head) * p.head_dim_qk * p.head_dim_qk + begin;
  const bool aligned = reinterpret_cast<uintptr_t>(p.key_feedback) % 16 == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < (begin + kRoundedLanes) * 4; i += kRoundedThreads) {
    float* const four = to[i / 4] + i % 4 * 4;
    const float* const source = from + i / 4 * p.head_dim_qk + i % 4 * 4;
    if (aligned) {
      ptx::cp_async<16>(four, source);
    } else {
      for (int j = 0; j < 4; ++j) ptx::cp_async<4>(four + j, source + j);
    }
  }
  ptx::cp_async_commit_group();
}

// Puts a key, rotated and less its offset, into `to`. Returns what is stored as its (scale, zero).
template <class T>
__device__ __forceinline__ __half2 load_key(const AppendKvParams& p, int64_t token, int head,
                                            const Lanes& lanes, float* to) {
  const T* const k = static_cast<const T*>(p.k) + token * p.k_in_token_stride + head * p.k_in_head_stride;
  const float* const offset = p.key_offset + head * p.head_dim_qk;
  const int64_t position = p.cos_sin == nullptr ? 0 : p.positions[token];
  const float* const angles = p.cos_sin + position * p.rotary_dim;
  float low = INFINITY, high = -INFINITY, check = 0.0f;
#pragma unroll 4
  for (int e = threadIdx.x % kRoundedLanes; e < p.head_dim_qk; e += kRoundedLanes) {
    float x = to_float(k[e]);
    if (e < p.rotary_dim) x = turned(p, angles, e, x, to_float(k[partner_of(p, e)]));
    x -= offset[e];
    check += x * 0.0f;
    low = fminf(low, x);
    high = fmaxf(high, x);
    to[e] = x;
  }
  return row_scale(lanes, low, high, check, 15.0f);
}

// How a key's elements become codes.
struct Rounding {
  float scale, zero, divisor, inverse;
  __device__ __forceinline__ explicit Rounding(float2 scale)
      : scale(scale.x), zero(scale.y), divisor(scale.x > 0.0f ? scale.x : 1.0f), inverse(1.0f / divisor) {}

  __device__ __forceinline__ float code(float x) const {
    // The quotient to its last bit, as the division would give it, but in three instructions.
    const float distance = x - zero, guess = distance * inverse;
    const float quotient = fmaf(fmaf(-guess, divisor, distance), inverse, guess);
    // Behind 2^23 a float has no fraction. rintf is as exact, but no fma unit's.
    return fminf(fmaxf(quotient, 0.0f), 15.0f) + 0x1p23f - 0x1p23f;
  }
  __device__ __forceinline__ float error(float x) const { return x - fmaf(code(x), scale, zero); }
};

// Rounds the elements at positions begin to begin + 15; those ahead of them have been.
template <class Key>
__device__ __forceinline__ void round_block(Key& key, const Rounding& rounding, const int* order, int begin,
                                            const float (*feedback)[kRoundedLanes]) {
  const int lane = threadIdx.x % kRoundedLanes, element = order[begin + lane];
  float x = key.x[element];
  for (int i = 0; i < begin; i += kRoundedLanes) {
#pragma unroll
    for (int j = 0; j < kRoundedLanes; ++j) x = fmaf(-key.errors[i + j], feedback[i + j][lane], x);
  }
  float own[kRoundedLanes];
#pragma unroll
  for (int j = 0; j < kRoundedLanes; ++j) own[j] = lane > j ? feedback[begin + j][lane] : 0.0f;
#pragma unroll
  for (int j = 0; j < kRoundedLanes - 1; ++j)
    x = fmaf(-__shfl_sync(kFullMask, rounding.error(x), j, kRoundedLanes), own[j], x);
  key.errors[begin + lane] = rounding.error(x);
  key.x[element] = rounding.code(x);
}

template <class T, int kMostDim>
__global__ void __launch_bounds__(kRoundedThreads)
append_rounded_keys_kernel(const __grid_constant__ AppendKvParams p, bool aligned) {
  auto& smem = dynamic_smem<RoundedStorage<kMostDim>>();
  auto& key = smem.keys[threadIdx.x / kRoundedLanes];
  const Lanes lanes(kRoundedLanes);
  const int head = int(blockIdx.y), head_dim = p.head_dim_qk;
  const int64_t token = int64_t(blockIdx.x) * kRoundedKeys + threadIdx.x / kRoundedLanes;
  const int slot = token < p.num_tokens ? p.slot_mapping[token] : -1;

  copy_feedback(p, head, 0, smem.feedback[0]);
  const int32_t* const order = p.key_order + head * head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < head_dim; i += kRoundedThreads) smem.order[i] = order[i];
  __half2 scale = __floats2half2_rn(0.0f, 0.0f);
  if (slot >= 0) {
    scale = load_key<T>(p, token, head, lanes, key.x);
  } else {  // its lanes go along
#pragma unroll 1
    for (int e = threadIdx.x % kRoundedLanes; e < head_dim; e += kRoundedLanes) key.x[e] = 0.0f;
  }
  const Rounding rounding(__half22float2(scale));

  for (int begin = 0, turn = 0; begin < head_dim; begin += kRoundedLanes, turn ^= 1) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this turn's feedback is there, and the other's has been used
    if (begin + kRoundedLanes < head_dim)
      copy_feedback(p, head, begin + kRoundedLanes, smem.feedback[turn ^ 1]);
    round_block(key, rounding, smem.order, begin, smem.feedback[turn]);
  }
  __syncwarp();
  if (slot < 0) return;

  const KvRows rows = kv_rows<Int4>(p, 0, head, p.num_kv_heads, p.page_size);
  const int page = slot / p.page_size, offset = slot % p.page_size;
  if (lanes.d == 0) *const_cast<__half2*>(rows.scale(page, offset)) = scale;
  uint8_t* const row = reinterpret_cast<uint8_t*>(rows.row(page, offset));
#pragma unroll 1
  for (int e = lanes.d; e < head_dim; e += 8 * kRoundedLanes) {
    Eight<uint8_t> q;
#pragma unroll
    for (int i = 0; i < 8; ++i) q.at[i] = uint8_t(key.x[e + i]);
    store_nibbles(row + e / 2, q, aligned);
  }
}

template <class T, int kMostDim>
void launch_rounded_keys(const AppendKvParams& p, Stream stream) {
  const unsigned blocks = unsigned(ceil_div(p.num_tokens, kRoundedKeys));
  const LaunchConfig config{.grid = {blocks, unsigned(p.num_kv_heads)},
                            .block = kRoundedThreads,
                            .smem_bytes = sizeof(RoundedStorage<kMostDim>),
                            .stream = stream};
  launch(append_rounded_keys_kernel<T, kMostDim>, config, p, cache_aligned<Int4>(p));
}

// ---- the launches ---------------------------------------------------------------------------------

template <class T, class KV>
bool is_aligned(const AppendKvParams& p) {
  const bool angles = p.cos_sin == nullptr ||
                      (rows_aligned(p.cos_sin, sizeof(float), p.rotary_dim) && p.rotary_dim % 16 == 0);
  return angles && rows_aligned(p.q, sizeof(T), p.q_token_stride, p.q_head_stride) &&
         rows_aligned(p.k, sizeof(T), p.k_in_token_stride, p.k_in_head_stride) &&
         rows_aligned(p.v, sizeof(T), p.v_in_token_stride, p.v_in_head_stride) &&
         cache_aligned<KV>(p);
}

}  // namespace

void append_kv(const AppendKvParams& p, Stream stream) {
  require_strided("append_kv", p);
  const int num_q_rows = p.q != nullptr && p.cos_sin != nullptr ? p.num_qo_heads : 0;
  int lanes = 2;
  while (lanes * 8 < max(p.head_dim_qk, p.head_dim_vo)) lanes *= 2;
  const int threads = int(round_up((num_q_rows + 2 * p.num_kv_heads) * lanes, kWarpSize));  // for a token
  const int block = min(threads, kBlockThreads);
  const LaunchConfig config{.grid = {unsigned(p.num_tokens), unsigned(ceil_div(threads, block))},
                            .block = unsigned(block),
                            .stream = stream};
  with_element(p.x_dtype, [&](auto element) {
    with_kv(p.kv_dtype, [&](auto kv) {
      using T = decltype(element);
      using KV = decltype(kv);
      const bool aligned = is_aligned<T, KV>(p);
      p.key_stats == nullptr ? launch(append_kv_kernel<T, KV, false>, config, p, num_q_rows, lanes, aligned)
                             : launch(append_kv_kernel<T, KV, true>, config, p, num_q_rows, lanes, aligned);
    });
    if (p.key_feedback == nullptr) return;
    using T = decltype(element);
    p.head_dim_qk <= 128 ? launch_rounded_keys<T, 128>(p, stream) : launch_rounded_keys<T, 256>(p, stream);
  });
}

}  // namespace tilestream::cuda
