// Float weights: a plain kernel, one lane a column, for layers that are not quantised.
//
// Products of bfloat16 weights are of bfloat16 activations, all sums in float32: of 128 k each, then of those. Weights are
// read coalesced, 128 bytes a warp; activations are the same for all lanes. Bound by instructions from 2 rows on.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/common/packed_group.cuh"

namespace tilestream::cuda {

constexpr int kFloatRows = 8;

struct FloatStorage {
  SliceSums<kFloatRows> sums;
};

template <PackedFormat F, class T>
__global__ void __launch_bounds__(kBlockThreads) float_kernel(const __grid_constant__ LinearParams p) {
  constexpr bool kPairs = F == PackedFormat::kBFloat16;
  constexpr int kStep = kPairs ? 2 : 1;
  auto& smem = dynamic_smem<FloatStorage>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto* panel = static_cast<const unsigned char*>(p.weight) + int64_t(blockIdx.x) * panel_bytes(F, p.k);
  const T* rows[kFloatRows];  // those past the last row read it again
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r)
    rows[r] = static_cast<const T*>(p.x) + min(int64_t(blockIdx.y) * kFloatRows + r, p.m - 1) * p.x_row_stride;
  const auto x = [&](int r, int64_t k) {
    if constexpr (kPairs) return k < p.k ? to_float(from_float<__nv_bfloat16>(to_float(rows[r][k]))) : 0.0f;
    else return to_float(rows[r][k]);
  };

  float total[kFloatRows] = {};
  for (int64_t begin = int64_t(warp) * kScaleK; begin < p.k; begin += kSlices * kScaleK) {
    const int64_t end = min(begin + kScaleK, p.k);
    float acc[kFloatRows] = {};
#pragma unroll 4
    for (int64_t k = begin; k < end; k += kStep) {
      const auto* at = panel + (k / kStep * kPanelColumns + lane) * 4;
      float2 w;
      if constexpr (kPairs) w = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
      else w = make_float2(*reinterpret_cast<const float*>(at), 0.0f);
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) {
        acc[r] = fmaf(w.x, x(r, k), acc[r]);
        if constexpr (kPairs) acc[r] = fmaf(w.y, x(r, k + 1), acc[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) total[r] += acc[r];
  }
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) smem.sums[warp][r][lane] = total[r];
  store_tile<kFloatRows>(p, smem.sums);
}

// Instantiations: 2 formats x 3 element types of x.
template <PackedFormat F>
void launch_float(const LinearParams& p, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    launch(float_kernel<F, decltype(element)>,
           {.grid = tile_grid<kFloatRows>(p), .block = kBlockThreads, .smem_bytes = sizeof(FloatStorage), .stream = stream}, p);
  });
}

}  // namespace tilestream::cuda
