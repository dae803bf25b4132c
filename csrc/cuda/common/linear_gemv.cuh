// Row-major 16-bit weights without tensor cores, for 1 to 8 rows: no shared memory, no barrier.
//
// A warp makes two columns of y: it reads two rows of the weight in pieces of 4 x 512 bytes each, a lane 16
// of every 512, and multiplies each by the same k of up to 8 rows of x, which come from L1. K is summed by
// each lane, then over lanes: a row's bits do not depend on M.
//
// Bound by reading the weights up to about 4 rows: 4 KB under way in each of the 16 or more warps that N >=
// 4,096 gives an SM are more than the 36 KB that 4.8 TB/s ask for (linear_rows.cuh). Instructions bind above:
// 16 + 25 M of them for 1 KB of weights, of which an H200's SM reads one in 50 cycles and issues 200 (an
// estimate).
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/ptx/memory.cuh"

namespace tilestream::cuda {

constexpr int kGemvThreads = 256, kGemvColumns = 2, kGemvAhead = 4;

// acc += the 8 products of two chunks.
template <class T>
__device__ __forceinline__ float dot_chunk(const uint4& weight, const float (&x)[8], float acc) {
  const auto& w = reinterpret_cast<const Vec<T>&>(weight);
#pragma unroll
  for (int i = 0; i < 8; ++i) acc = fmaf(to_float(w.at[i]), x[i], acc);
  return acc;
}

template <class T, int kRows>
__global__ void __launch_bounds__(kGemvThreads) gemv_kernel(const __grid_constant__ LinearParams p) {
  constexpr int64_t kStride = 8 * kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_column = (int64_t(blockIdx.x) * (kGemvThreads / kWarpSize) + warp) * kGemvColumns;
  const int64_t first_row = int64_t(blockIdx.y) * kRows;
  const T* weight[kGemvColumns];  // those past the last column or row read it again
  const T* x[kRows];
#pragma unroll
  for (int c = 0; c < kGemvColumns; ++c)
    weight[c] = static_cast<const T*>(p.weight) + min(first_column + c, p.n - 1) * p.k;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    x[r] = static_cast<const T*>(p.x) + min(first_row + r, p.m - 1) * p.x_row_stride;

  float acc[kRows][kGemvColumns] = {};
  for (int64_t begin = 8 * lane; begin < p.k; begin += kGemvAhead * kStride) {
    uint4 w[kGemvAhead][kGemvColumns];
#pragma unroll
    for (int i = 0; i < kGemvAhead * kGemvColumns; ++i) {
      const int ahead = i / kGemvColumns, c = i % kGemvColumns;
      const int64_t k = begin + ahead * kStride;
      w[ahead][c] = k < p.k ? ptx::ld_nc_no_allocate(reinterpret_cast<const uint4*>(weight[c] + k)) : uint4{};
    }
#pragma unroll
    for (int ahead = 0; ahead < kGemvAhead; ++ahead) {
      const int64_t k = begin + ahead * kStride;
      if (k >= p.k) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto chunk = *reinterpret_cast<const Vec<T>*>(x[r] + k);
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = to_float(chunk.at[i]);
#pragma unroll
        for (int c = 0; c < kGemvColumns; ++c) acc[r][c] = dot_chunk<T>(w[ahead][c], values, acc[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sums[kGemvColumns];
#pragma unroll
    for (int c = 0; c < kGemvColumns; ++c) sums[c] = warp_sum(acc[r][c]);
    if (lane == r && first_row + r < p.m) store_outputs<kGemvColumns>(p, first_row + r, first_column, sums);
  }
}

// Instantiations: 2 element types x 1, 2, 4 and 8 rows.
template <class T>
void launch_gemv(const LinearParams& p, Stream stream) {
  const auto launch_with = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value, kColumns = kGemvThreads / kWarpSize * kGemvColumns;
    const dim3 grid(unsigned(ceil_div(p.n, kColumns)), unsigned(ceil_div(p.m, kRows)));
    launch(gemv_kernel<T, kRows>, {.grid = grid, .block = kGemvThreads, .stream = stream}, p);
  };
  if (p.m == 1) launch_with(Constant<1>{});
  else if (p.m == 2) launch_with(Constant<2>{});
  else if (p.m <= 4) launch_with(Constant<4>{});
  else launch_with(Constant<8>{});
}

}  // namespace tilestream::cuda
