// What both lanes of the Hopper attention do with a job's rows.
#pragma once

#include "cuda/attention_sm90_config.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace tilestream::cuda {

// The maximum that a row's weights are relative to moves only when a tile has a logit so many powers of two above it.
constexpr float kLazyLog2 = 8.0f;  // weights stay below 2^8, and sums of 2^7 of them below float16's largest number

template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) return ptx::cvt_f16x2(low, high);
  else return ptx::cvt_bf16x2(low, high);
}

// a from registers, or from shared memory by a descriptor.
template <class T, ptx::Major kMajorB, ptx::Major kMajorA = ptx::Major::kK, int kNum, class A>
__device__ __forceinline__ void multiply(float (&d)[kNum], const A& a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<A, uint64_t>) {
    if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<kMajorA, kMajorB>(d, a, b, accumulate);
    else ptx::wgmma_m64k16_bf16<kMajorA, kMajorB>(d, a, b, accumulate);
  } else {
    if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<kMajorB>(d, a, b, accumulate);
    else ptx::wgmma_m64k16_bf16<kMajorB>(d, a, b, accumulate);
  }
}

// A warp's rows of q, of the kRows of its warpgroup, from row `first` of the job on, to where wgmma reads them; those past the
// job's end are its last row, columns past head_dim_qk 0, as K's are. Where q is as the products take it, it comes by copies
// that are still under way.
template <class C, int kRows>
__device__ __forceinline__ void load_q(const AttentionParams& p, const LogitRule& rule, const Job& job, int first, unsigned char* q) {
  using T = typename C::T;
  constexpr int kChunks = C::kPanelsQk * 8, kWarpRows = kRows / 4;
  const int thread = ptx::opaque(threadIdx.x), lane = thread % kWarpSize, warp = thread % kGroupThreads / kWarpSize;
  const auto place = [&](int i) {
    const int r = warp * kWarpRows + i / kChunks, chunk = i % kChunks;
    unsigned char* const panel = q + chunk / 8 * (kRows * kPanelRowBytes);
    return reinterpret_cast<Vec<T>*>(panel + ptx::swizzled(ptx::Swizzle::k128, r * kPanelRowBytes + chunk % 8 * 16));
  };
  const auto source = [&](int i) {
    const int row = min(first + i / kChunks, job.num_rows - 1);
    return job.token(row) * p.q_token_stride + job.head(row) * p.q_head_stride + i % kChunks * 8;
  };
  const bool is_aligned = rows_aligned(p.q, dtype_bytes(p.q_dtype, 1), p.q_token_stride, p.q_head_stride);
  if (is_aligned && rule.q_sign == 1.0f && p.q_dtype == (std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16)) {
#pragma unroll 4  // as many rows' tokens are looked up at once
    for (int i = lane; i < kWarpRows * kChunks; i += kWarpSize) {
      const bool is_column = i % kChunks * 8 < p.head_dim_qk;
      ptx::cp_async<16>(place(i), static_cast<const T*>(p.q) + (is_column ? source(i) : 0), is_column ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < kWarpRows * kChunks; i += kWarpSize) {
    Vec<T> packed{};
    if (i % kChunks * 8 < p.head_dim_qk) {
      Floats8 values;
      if (p.q_dtype == DType::kBFloat16) values = load_floats<__nv_bfloat16>(p.q, source(i), is_aligned);
      else if (p.q_dtype == DType::kFloat16) values = load_floats<__half>(p.q, source(i), is_aligned);
      else values = load_floats<float>(p.q, source(i), is_aligned);
#pragma unroll
      for (int k = 0; k < 8; ++k) packed.at[k] = from_float<T>(values.at[k] * rule.q_sign);
    }
    *place(i) = packed;
  }
}

// Among kNum lanes, kStride apart: the lane at place i gets v[i] of each of them, in their order.
template <int kStride, int kNum>
__device__ __forceinline__ void transpose_lanes(float (&v)[kNum]) {
  const int place = ptx::opaque(threadIdx.x) / kStride % kNum;
#pragma unroll
  for (int distance = 1; distance < kNum; distance *= 2) {
    const bool upper = place & distance;
#pragma unroll
    for (int a = 0; a < kNum; ++a) {
      if (a & distance) continue;
      float& low = v[a];
      float& high = v[a | distance];
      const float got = __shfl_xor_sync(kFullMask, upper ? low : high, distance * kStride);
      (upper ? low : high) = got;
    }
  }
}

}  // namespace tilestream::cuda
