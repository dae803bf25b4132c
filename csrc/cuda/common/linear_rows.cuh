// Row-major 16-bit weights on tensor cores, for M up to 64: the flat GEMM of FlashDecoding++ (Hong et al.
// 2023).
//
// The weight's rows are the rows of mma.m16n8k16 and the activations' rows its 8 columns, so that M is padded
// to 8 only. A block of 4 warps has 128 columns of y, a warp a panel of 32, and 8 to 64 rows; both operands
// stream through a ring of 4 stages of 64 k, by cp.async of 16 bytes, 8 lanes to a 128-byte line. Above 64
// rows the weights are read again for each 64, from L2: other libraries are faster there.
//
// K is divided among as many blocks as make two for each of an H200's 132 SMs, at most 8, each with at least
// 512 k (num_slices); that depends on N and K alone, so a row's bits do not depend on M. sum_slices_kernel
// adds what they leave.
// Bound by reading the weights: two blocks keep 2 x 48 KB under way, where 4.8 TB/s with a latency of 1 us
// under load (an estimate) ask for 36 KB. At 64 rows they also read half as many bytes of rows, from L2.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

constexpr int kRowsWarps = kTileColumns / kPanelColumns, kRowsThreads = kRowsWarps * kWarpSize;
constexpr int kStepK = 64, kStepChunks = kStepK / 8;  // a chunk is 16 bytes

template <int kTiles>
struct RowsStorage {
  struct Stage {
    uint4 weight[kTileColumns][kStepChunks];
    uint4 x[8 * kTiles][kStepChunks];
  };
  static constexpr int kStages = 4;  // 96 KB with 64 rows: what sm_86 has
  Stage ring[kStages];
};

// ldmatrix reads 8 rows at once: 4 apart of the weight, adjacent ones of x. Chunks are moved so that they lie
// in different banks.
__device__ __forceinline__ int weight_chunk(int column, int chunk) { return chunk ^ (column >> 2 & 7); }
__device__ __forceinline__ int x_chunk(int row, int chunk) { return chunk ^ (row & 7); }

// Starts the copies of one step; what lies past n, m or k is zeros.
template <class Stage, class T>
__device__ __forceinline__ void fetch_step(const LinearParams& p, Stage& stage, const T* weight, const T* x,
                                           int64_t columns, int64_t rows, int64_t k) {
  const int first = threadIdx.x / kStepChunks, chunk = threadIdx.x % kStepChunks;
  const int64_t at = k + 8 * chunk;
  constexpr int kAtOnce = kRowsThreads / kStepChunks, kXRows = sizeof(stage.x) / sizeof(stage.x[0]);
#pragma unroll
  for (int i = first; i < kTileColumns; i += kAtOnce) {
    const bool inside = i < columns && at < p.k;
    const T* const from = inside ? weight + i * p.k + at : weight;
    ptx::cp_async<16>(&stage.weight[i][weight_chunk(i, chunk)], from, inside ? 16 : 0);
  }
#pragma unroll
  for (int i = first; i < kXRows; i += kAtOnce) {
    const bool inside = i < rows && at < p.k;
    const T* const from = inside ? x + i * p.x_row_stride + at : x;
    ptx::cp_async<16>(&stage.x[i][x_chunk(i, chunk)], from, inside ? 16 : 0);
  }
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) ptx::mma_m16n8k16_f16(d, a, b);
  else ptx::mma_m16n8k16_bf16(d, a, b);
}

// total += one step. Rows g and g + 8 of mma h are columns 4g + 2h and 4g + 2h + 1 of the panel.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_step(const typename RowsStorage<kTiles>::Stage& stage,
                                              Fragments<kTiles>& total) {
  const int lane = threadIdx.x % kWarpSize, matrix = lane / 8, r = lane % 8;
  const auto* const weight = stage.weight + threadIdx.x / kWarpSize * kPanelColumns;
#pragma unroll
  for (int chunk = 0; chunk < kStepChunks; chunk += 4) {  // 32 k: two steps of mma
    unsigned w[2][2][4];                                  // [step][h]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = i / 2, h = i % 2, column = 4 * r + 2 * h + matrix % 2;
      ptx::ldmatrix_x4(w[step][h], &weight[column][weight_chunk(column, chunk + 2 * step + matrix / 2)]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      unsigned x[4];  // of the first step, then of the second
      ptx::ldmatrix_x4(x, &stage.x[8 * tile + r][x_chunk(r, chunk + matrix)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_m16n8k16<T>(total[tile][h], w[0][h], {x[0], x[1]});
        mma_m16n8k16<T>(total[tile][h], w[1][h], {x[2], x[3]});
      }
    }
  }
}

// Blocks: (tiles of rows, tiles of 128 columns, slices of K).
template <class T, int kTiles>
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const __grid_constant__ LinearParams p) {
  using Storage = RowsStorage<kTiles>;
  constexpr int kStages = Storage::kStages;
  auto& ring = dynamic_smem<Storage>().ring;
  const int64_t first_row = int64_t(blockIdx.x) * 8 * kTiles;
  const int64_t first_column = int64_t(blockIdx.y) * kTileColumns;
  const T* const weight = static_cast<const T*>(p.weight) + first_column * p.k;
  const T* const x = static_cast<const T*>(p.x) + first_row * p.x_row_stride;
  const int num_steps = int(ceil_div(p.k, kStepK)), num_slices = gridDim.z, slice = blockIdx.z;
  const int begin = num_steps * slice / num_slices, end = num_steps * (slice + 1) / num_slices;
  const auto fetch = [&](int stage, int step) {
    if (step < end)
      fetch_step(p, ring[stage], weight, x, p.n - first_column, p.m - first_row, int64_t(step) * kStepK);
    ptx::cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i, begin + i);
  Fragments<kTiles> total = {};
  int at = 0;
  for (int step = begin; step < end; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the step is here, and everybody has left the stage that is filled next
    fetch((at + kStages - 1) % kStages, step + kStages - 1);
    multiply_step<T, kTiles>(ring[at], total);
    at = (at + 1) % kStages;
  }
  ptx::cp_async_wait_all();
  const int64_t panel = blockIdx.y * kRowsWarps + threadIdx.x / kWarpSize;
  const int shares = num_slices > 1 ? slice : kAllSlices;
  if (panel * kPanelColumns < p.n) store_fragments<kTiles>(p, first_row, panel, total, {0, 0}, shares);
}

template <class T, int kTiles>
void launch_row_tiles(const LinearParams& p, Stream stream) {
  launch_tiles(rows_kernel<T, kTiles>, 8 * kTiles, kRowsThreads, sizeof(RowsStorage<kTiles>), p, stream);
}

// Instantiations: 2 element types x tiles of 8, 16, 32 and 64 rows.
template <class T>
void launch_rows(const LinearParams& p, Stream stream) {
  if (p.m <= 8) launch_row_tiles<T, 1>(p, stream);
  else if (p.m <= 16) launch_row_tiles<T, 2>(p, stream);
  else if (p.m <= 32) launch_row_tiles<T, 4>(p, stream);
  else launch_row_tiles<T, 8>(p, stream);
}

}  // namespace tilestream::cuda
