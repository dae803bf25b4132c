// Float weights in panels: plain kernels, for layers that are not quantised. A warp takes a slice of K and
// sums in float32, over 128 k each, then over those.
//
//   kBFloat16  mma.m16n8k16 as in linear_int8.cuh, operands straight from global memory; activations are
//              rounded
//   kFloat32   one lane a column; bound by instructions from 2 rows on
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

template <int kRows>
struct FloatStorage {
  alignas(16) SliceSums<kRows> sums;
};

// Elements k and k + 1 of a row, 0 past its end.
template <class T>
__device__ __forceinline__ unsigned bf16_pair(const T* row, int64_t k, int64_t end) {
  return ptx::cvt_bf16x2(k < end ? to_float(row[k]) : 0.0f, k + 1 < end ? to_float(row[k + 1]) : 0.0f);
}

// Of each 16 k, lane (g, t) takes k 4t .. 4t + 3: two pairs of k of columns 4g .. 4g + 3, 16 bytes each.
template <class T, int kTiles>
__global__ void __launch_bounds__(kBlockThreads) bf16_kernel(const __grid_constant__ LinearParams p) {
  constexpr int kStep = 16, kPairChunks = kPanelColumns * 4 / 16;
  auto& smem = dynamic_smem<FloatStorage<8 * kTiles>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int num_spans = int(ceil_div(p.k, kScaleK));
  const int64_t num_pairs = ceil_div(p.k, 2);
  const auto* panel = static_cast<const uint4*>(p.weight) + int64_t(blockIdx.x) * num_pairs * kPairChunks + g;
  const auto weight = [&](int64_t pair) {
    return pair < num_pairs ? ptx::ld_nc_no_allocate(panel + pair * kPairChunks) : make_uint4(0, 0, 0, 0);
  };
  Fragments<kTiles> total = {};
  for (int span = first_span(num_spans, warp); span < first_span(num_spans, warp + 1); ++span) {
    const int64_t begin = int64_t(span) * kScaleK, end = min(begin + kScaleK, p.k);
    Fragments<kTiles> acc = {};
#pragma unroll (kTiles == 1 ? 2 : 1)
    for (int64_t at = begin; at < end; at += kStep) {
      const int64_t k = at + 4 * t;
      const uint4 low = weight(k / 2), high = weight(k / 2 + 1);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t row_idx = int64_t(blockIdx.y) * 8 * kTiles + 8 * tile + g;
        const T* row = static_cast<const T*>(p.x) + row_idx * p.x_row_stride;
        const int64_t row_end = row_idx < p.m ? p.k : 0;  // rows past the last are zeros
        const unsigned x[2] = {bf16_pair(row, k, row_end), bf16_pair(row, k + 2, row_end)};
        ptx::mma_m16n8k16_bf16(acc[tile][0], {low.x, low.y, high.x, high.y}, x);
        ptx::mma_m16n8k16_bf16(acc[tile][1], {low.z, low.w, high.z, high.w}, x);
      }
    }
    add_fragments<kTiles>(total, acc);
  }
  put_fragments<kTiles>(smem.sums[warp], total);
  store_tile<8 * kTiles>(p, smem.sums);
}

constexpr int kFloatRows = 8;

template <class T>
__global__ void __launch_bounds__(kBlockThreads) float_kernel(const __grid_constant__ LinearParams p) {
  auto& smem = dynamic_smem<FloatStorage<kFloatRows>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const float* panel = static_cast<const float*>(p.weight) + int64_t(blockIdx.x) * p.k * kPanelColumns + lane;
  const T* rows[kFloatRows];  // those past the last row read it again
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) {
    const int64_t row_idx = min(int64_t(blockIdx.y) * kFloatRows + r, p.m - 1);
    rows[r] = static_cast<const T*>(p.x) + row_idx * p.x_row_stride;
  }
  const int num_spans = int(ceil_div(p.k, kScaleK));
  float total[kFloatRows] = {};
  for (int span = first_span(num_spans, warp); span < first_span(num_spans, warp + 1); ++span) {
    const int64_t begin = int64_t(span) * kScaleK, end = min(begin + kScaleK, p.k);
    float acc[kFloatRows] = {};
#pragma unroll 4
    for (int64_t k = begin; k < end; ++k) {
      const float w = panel[k * kPanelColumns];
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) acc[r] = fmaf(w, to_float(rows[r][k]), acc[r]);
    }
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) total[r] += acc[r];
  }
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) smem.sums[warp][r][lane] = total[r];
  store_tile<kFloatRows>(p, smem.sums);
}

// Instantiations: 3 element types of x; bfloat16 weights with tiles of 8 and 32 rows.
template <PackedFormat F>
void launch_float(const LinearParams& p, Stream stream) {
  const auto launch_rows = [&](auto kernel, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const dim3 grid(unsigned(ceil_div(p.n, kPanelColumns)), unsigned(ceil_div(p.m, kRows)));
    constexpr size_t kBytes = sizeof(FloatStorage<kRows>);
    launch(kernel, {.grid = grid, .block = kBlockThreads, .smem_bytes = kBytes, .stream = stream}, p);
  };
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (F == PackedFormat::kFloat32) launch_rows(float_kernel<T>, Constant<kFloatRows>{});
    else if (p.m <= 8) launch_rows(bf16_kernel<T, 1>, Constant<8>{});
    else launch_rows(bf16_kernel<T, 4>, Constant<32>{});
  });
}

}  // namespace tilestream::cuda
