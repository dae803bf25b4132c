// A paged KV cache in KvLayout::kStrided: where a token's row lies, and what its bytes mean.
#pragma once

#include <type_traits>

#include "cuda/common/fp8.cuh"
#include "cuda/common/vec.cuh"

namespace tilestream::cuda {

// What a cache stores, as types: float, __half, __nv_bfloat16, __nv_fp8_e4m3, or Int8 and Int4 (types.h).
struct Int8 {};
struct Int4 {};
template <class KV>
constexpr bool kIsQuantised = std::is_same_v<KV, Int8> || std::is_same_v<KV, Int4>;
template <class KV>
constexpr int kKvBits = std::is_same_v<KV, Int8> ? 8 : std::is_same_v<KV, Int4> ? 4 : 8 * int(sizeof(KV));

__device__ __forceinline__ __half2 half2_of_e4m3(unsigned short pair) {
  const unsigned halves = e4m3x2_to_f16x2(pair);
  return reinterpret_cast<const __half2&>(halves);
}
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 v) { return to_float(half2_of_e4m3(v.__x).x); }
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float v) {
  __nv_fp8_e4m3 r;
  r.__x = (unsigned char)f32_to_e4m3x2(v, 0.0f);
  return r;
}

// One side (K or V) of a cache, at one kv head. Strides in bytes.
struct KvRows {
  char* rows;           // of page 0
  const __half2* scales;  // (scale, zero) of page 0, offset 0; null if the cache is not quantised
  int64_t page_stride, token_stride, scales_page_stride;

  __device__ __forceinline__ char* row(int64_t page, int offset) const {
    return rows + page * page_stride + offset * token_stride;
  }
  __device__ __forceinline__ const __half2* scale(int64_t page, int offset) const {
    return scales + page * scales_page_stride + offset;
  }
};

// Params: AttentionParams, AppendKvParams or GatherKvParams. side: 0 for K, 1 for V.
template <class KV, class Params>
__device__ __forceinline__ KvRows kv_rows(const Params& p, int side, int head, int num_kv_heads, int page_size) {
  // A stride counts elements, of int4 bytes.
  constexpr int64_t kUnit = kKvBits<KV> == 4 ? 1 : kKvBits<KV> / 8;
  char* const cache = static_cast<char*>(const_cast<void*>(side == 0 ? p.k_cache : p.v_cache));
  const int64_t head_stride = side == 0 ? p.k_head_stride : p.v_head_stride;
  const auto* scales = static_cast<const __half2*>(p.kv_scales);
  return {cache + head * head_stride * kUnit,
          scales == nullptr ? nullptr : scales + (int64_t(side) * num_kv_heads + head) * page_size,
          (side == 0 ? p.k_page_stride : p.v_page_stride) * kUnit,
          (side == 0 ? p.k_token_stride : p.v_token_stride) * kUnit,
          int64_t(2) * num_kv_heads * page_size};
}

// Value d of a row; of e4m3 as it is stored, without k_scale and v_scale.
template <class KV>
__device__ __forceinline__ float kv_value(const char* row, int d, float2 scale) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(row);
  if constexpr (std::is_same_v<KV, Int8>) return fmaf(float(bytes[d]), scale.x, scale.y);
  else if constexpr (kKvBits<KV> == 4) return fmaf(float(bytes[d / 2] >> d % 2 * 4 & 15), scale.x, scale.y);
  else return to_float(reinterpret_cast<const KV*>(row)[d]);
}

// (scale, zero) of a row; unused (0, 0) of a cache that is not quantised.
template <class KV>
__device__ __forceinline__ float2 kv_scale(const KvRows& side, int64_t page, int offset) {
  if constexpr (kIsQuantised<KV>) return __half22float2(*side.scale(page, offset));
  else return {0.0f, 0.0f};
}

// Whether 8 neighbours of any row, from a multiple of 8 on, can be loaded and stored at once.
template <class KV, class Params>
inline bool cache_aligned(const Params& p) {
  constexpr int64_t kUnit = kKvBits<KV> == 4 ? 1 : kKvBits<KV> / 8, kBytes = kKvBits<KV> < 16 ? kKvBits<KV> : 16;
  const int64_t strides = p.k_page_stride | p.k_head_stride | p.k_token_stride | p.v_page_stride |
                          p.v_head_stride | p.v_token_stride;
  const auto pointers = reinterpret_cast<uintptr_t>(p.k_cache) | reinterpret_cast<uintptr_t>(p.v_cache);
  return (strides * kUnit | int64_t(pointers)) % kBytes == 0;
}

template <class Params>
inline void require_strided(const char* op, const Params& p) {
  if (p.kv_layout == KvLayout::kStrided) return;
  throw std::invalid_argument(std::string(op) +
                              ": kv_layout is blocked, which is the CPU backend's own; on CUDA allowed: strided (hnd, nhd)");
}

// Calls f(KV{}) with what a cache of `dtype` stores.
template <class F>
void with_kv(KvDType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat8E4M3: return f(__nv_fp8_e4m3{});
    case DType::kUInt8: return f(Int8{});
    case DType::kUInt4: return f(Int4{});
  }
}

}  // namespace tilestream::cuda
