// What the kernels of linear.cu share: how K is divided, what a warp holds, and how sums become outputs.
//
// K is cut into kSlices runs of spans of 128 k. A slice is summed in the order of k, and the slices' sums are
// added in theirs: ((s0 + s1) + s2) + ... Whether the warps of a block take a slice each, or one warp takes
// them all, or each has a block of its own, a row's bits are the same: they do not depend on M, on the tile
// that the row falls into, or on the device.
#pragma once

#include <type_traits>

#include "cuda/common/linear_epilogue.cuh"
#include "cuda/common/reduce.cuh"

namespace tilestream::cuda {

constexpr int kBlockThreads = kSlices * kWarpSize;  // of the kernels that give a warp to each slice

// Slice s of num_spans spans is [first_span(s), first_span(s + 1)).
__device__ __forceinline__ int first_span(int num_spans, int slice) { return num_spans * slice / kSlices; }

template <int kRows>
using SliceSums = float[kSlices][kRows][kPanelColumns];

// What a lane (g, t) = (lane / 4, lane % 4) has of a tile whose weight columns are the rows of two mma, 8
// rows of x to a tile: [tile][h][i] is column 4g + 2h + i / 2 of row 8 tile + 2t + i % 2.
template <int kTiles>
using Fragments = float[kTiles][2][4];

// Columns 4g .. 4g + 3 of a lane's row r, 0 or 1, of a tile.
__device__ __forceinline__ float4 fragment_row(const float (&tile)[2][4], int r) {
  return make_float4(tile[0][r], tile[0][2 + r], tile[1][r], tile[1][2 + r]);
}

template <int kTiles>
__device__ __forceinline__ void add_fragments(Fragments<kTiles>& to, const Fragments<kTiles>& from) {
#pragma unroll
  for (int i = 0; i < kTiles * 8; ++i) to[i / 8][i / 4 % 2][i % 4] += from[i / 8][i / 4 % 2][i % 4];
}

template <int kTiles>
__device__ __forceinline__ void clear_fragments(Fragments<kTiles>& v) {
#pragma unroll
  for (int i = 0; i < kTiles * 8; ++i) v[i / 8][i / 4 % 2][i % 4] = 0.0f;
}

template <int kTiles>
__device__ __forceinline__ void put_fragments(float (&sums)[8 * kTiles][kPanelColumns],
                                              const Fragments<kTiles>& from) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<float4*>(&sums[8 * tile + 2 * t + r][4 * g]) = fragment_row(from[tile], r);
  }
}

// Adds up what every warp has put into `sums`. The whole block takes part.
template <int kRows>
__device__ __forceinline__ void store_tile(const LinearParams& p, const SliceSums<kRows>& sums) {
  __syncthreads();
  const int column = threadIdx.x % kPanelColumns;
  const int64_t n = int64_t(blockIdx.x) * kPanelColumns + column, first_row = int64_t(blockIdx.y) * kRows;
  if (n >= p.n || (is_gated(p) && column % 2 != 0)) return;
  const int num_rows = int(min(int64_t(kRows), p.m - first_row));
  for (int r = threadIdx.x / kPanelColumns; r < num_rows; r += kBlockThreads / kPanelColumns) {
    store_output(p, first_row + r, n, [&](int64_t of) {
      const int at = column + int(of - n);
      float sum = sums[0][r][at];
#pragma unroll
      for (int slice = 1; slice < kSlices; ++slice) sum += sums[slice][r][at];
      return sum;
    });
  }
}

// The tiles that blocks of one slice each share: those from `column` on, but of its own kTileColumns only from
// `row` on.
struct SharedTiles { int64_t column = 0, row = 0; };

// Where a block of `slice` leaves its sum of columns n on of a row, for sum_slices_kernel.
__device__ __forceinline__ float* partial_sum(const LinearParams& p, int slice, int64_t row, int64_t n,
                                              const SharedTiles& shared = {}) {
  const int64_t columns = round_up(p.n, kPanelColumns) - shared.column;
  return static_cast<float*>(p.workspace) + (slice * p.m + row) * columns + n - shared.column;
}

constexpr int kAllSlices = -1;

// A warp's finished rows of one panel: to y, or one slice of them to the partial sums.
template <int kTiles>
__device__ __forceinline__ void store_fragments(const LinearParams& p, int64_t first_row, int64_t panel,
                                                const Fragments<kTiles>& from, int slice,
                                                const SharedTiles& shared = {}) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t n = panel * kPanelColumns + 4 * g;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int64_t row = first_row + 8 * (i / 2) + 2 * t + i % 2;
    if (row >= p.m) continue;
    const float4 four = fragment_row(from[i / 2], i % 2);
    if (slice != kAllSlices) {
      *reinterpret_cast<float4*>(partial_sum(p, slice, row, n, shared)) = four;
    } else {
      store_outputs<4>(p, row, n, {four.x, four.y, four.z, four.w});
    }
  }
}

// One thread an output. Bound by reading the sums, which are still in L2.
constexpr int kSumThreads = 256;

static __global__ void __launch_bounds__(kSumThreads)
    sum_slices_kernel(const __grid_constant__ LinearParams p, SharedTiles shared, int num_slices) {
  const int64_t output = int64_t(blockIdx.y) * kSumThreads + threadIdx.x, row = blockIdx.x;
  const int64_t n = shared.column + output * columns_per_output(p);
  if (n >= p.n || (n < shared.column + kTileColumns && row < shared.row)) return;
  store_output(p, row, n, [&](int64_t of) {
    float sum = *partial_sum(p, 0, row, of, shared);
#pragma unroll 4
    for (int slice = 1; slice < num_slices; ++slice) sum += *partial_sum(p, slice, row, of, shared);
    return sum;
  });
}

inline void launch_sum(const LinearParams& p, const SharedTiles& shared, int slices, Stream stream) {
  const dim3 grid(unsigned(p.m), unsigned(ceil_div((p.n - shared.column) / columns_per_output(p), kSumThreads)));
  launch(sum_slices_kernel, {.grid = grid, .block = kSumThreads, .stream = stream}, p, shared, slices);
}

// Launches a kernel whose blocks are (tiles of rows, tiles of columns, slices), and what adds up the slices.
inline void launch_tiles(void (*kernel)(LinearParams), int rows, int threads, size_t smem_bytes,
                         const LinearParams& p, Stream stream) {
  const int slices = num_slices(p);
  const dim3 grid(unsigned(ceil_div(p.m, rows)), unsigned(ceil_div(p.n, kTileColumns)), unsigned(slices));
  launch(kernel, {.grid = grid, .block = unsigned(threads), .smem_bytes = smem_bytes, .stream = stream}, p);
  if (slices > 1) launch_sum(p, {}, slices, stream);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

}  // namespace tilestream::cuda
