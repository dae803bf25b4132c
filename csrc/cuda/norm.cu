// RMS normalisation, with the residual addition fused in.
//
//   residual += x;  out = residual * rsqrt(mean(residual^2) + eps) * weight      (without a residual: of x)
//
// A block of 256 threads takes one row, or 8 rows of one warp each when rows are short (heads of a fused QKV, or
// of up to 1,024 elements, for which 256 threads would have too few bytes under way). A thread keeps its first
// 4 vectors in registers (8,192 two-byte elements a block) and reads later ones again from L2.
//
// Memory-bound: the roof is a copy of the same bytes. Of 4,096 two-byte elements 4 blocks an SM have 32 KB under
// way, where an H200's 4.8 TB/s, half of them reads, with a latency of 1 us (an estimate) ask for 18 KB; and
// 200 instructions for each 1 KB that a warp reads and writes: weights come in vectors too, and rows are
// counted in 32 bits. Squares are summed in an order that depends on `hidden` alone, so a row's bits depend on
// nothing but the row. 32 bytes of shared memory.
#include "tilestream/norm.h"

#include "cuda/common/quantise.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kHeldVecs = 4;
constexpr int64_t kWarpRowElements = 1024;  // a row up to this goes to one warp: 4 vectors of 8 a lane, no block barrier

struct SharedStorage {
  float partials[kBlockThreads / kWarpSize];
};

template <class T>
struct Row {
  const T* x;
  T* residual;
  T* out;
};

template <class T>
__device__ __forceinline__ Row<T> row_at(const RmsNormParams& p, unsigned row) {
  const int64_t outer = row / unsigned(p.inner), inner = row % unsigned(p.inner);
  return {static_cast<const T*>(p.x) + outer * p.x_outer_stride + inner * p.x_inner_stride,
          static_cast<T*>(p.residual) + outer * p.residual_outer_stride + inner * p.residual_inner_stride,
          static_cast<T*>(p.out) + outer * p.out_outer_stride + inner * p.out_inner_stride};
}

// x, or residual + x rounded as it is stored, which this also does.
template <class T, bool kAligned, bool kResidual>
__device__ __forceinline__ Vec<T> load_sum(const Row<T>& row, int64_t i, int64_t num) {
  Vec<T> v = load_vec<kAligned>(row.x + i, num);
  if constexpr (kResidual) {
    const Vec<T> residual = load_vec<kAligned>(row.residual + i, num);
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) v.at[k] = from_float<T>(to_float(v.at[k]) + to_float(residual.at[k]));
    store_vec<kAligned>(row.residual + i, v, num);
  }
  return v;
}

template <class T>
__device__ __forceinline__ float add_squares(float sum, const Vec<T>& v) {
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) sum = fmaf(to_float(v.at[k]), to_float(v.at[k]), sum);
  return sum;
}

// Scaled elements from i on, as floats or as integers. The whole warp takes part.
template <bool kAligned, class T>
__device__ __forceinline__ void store_scaled(const RmsNormParams& p, unsigned row_idx, T* out, int64_t i,
                                             const Vec<T>& v, float inverse) {
  const int64_t num = p.hidden - i;
  float scaled[Vec<T>::kSize];
#pragma unroll
  for (int j = 0; j < Vec<T>::kSize; j += Vec<float>::kSize) {
    const Vec<float> weight = load_vec<kAligned>(p.weight + i + j, num - j);  // 0 past the end
#pragma unroll
    for (int k = 0; k < Vec<float>::kSize; ++k) scaled[j + k] = to_float(v.at[j + k]) * inverse * weight.at[k];
  }
  if (p.quantised.q != nullptr) return store_quantised(p.quantised, row_idx, p.hidden, i, scaled);
  Vec<T> rounded;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) rounded.at[k] = from_float<T>(scaled[k]);
  store_vec<kAligned>(out + i, rounded, num);
}

template <class T, bool kAligned, bool kResidual, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads, 3) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
  constexpr int64_t kStep = int64_t(kRowThreads) * Vec<T>::kSize;
  const unsigned row_idx = blockIdx.x * kRowsPerBlock + threadIdx.x / kRowThreads;  // of fewer than 2^32
  if (row_idx >= p.outer * p.inner) return;  // a whole warp of the last block, and only where no barrier follows
  const Row<T> row = row_at<T>(p, row_idx);
  const int64_t first = int64_t(threadIdx.x % kRowThreads) * Vec<T>::kSize;
  // Lanes past the row's end stay with their warp, and hold zeros.
  const int64_t end = p.hidden + int64_t(threadIdx.x % kWarpSize) * Vec<T>::kSize;

  Vec<T> held[kHeldVecs];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kHeldVecs; ++j) {
    const int64_t i = first + j * kStep;
    if (i < end) sum = add_squares(sum, held[j] = load_sum<T, kAligned, kResidual>(row, i, p.hidden - i));
  }
  for (int64_t i = first + kHeldVecs * kStep; i < end; i += kStep)
    sum = add_squares(sum, load_sum<T, kAligned, kResidual>(row, i, p.hidden - i));

  float total;
  if constexpr (kRowThreads == kWarpSize) total = warp_sum(sum);
  else total = block_sum(sum, dynamic_smem<SharedStorage>().partials);
  const float inverse = rsqrtf(total / float(p.hidden) + p.eps);

#pragma unroll
  for (int j = 0; j < kHeldVecs; ++j) {
    const int64_t i = first + j * kStep;
    if (i < end) store_scaled<kAligned>(p, row_idx, row.out, i, held[j], inverse);
  }
  for (int64_t i = first + kHeldVecs * kStep; i < end; i += kStep) {
    const Vec<T> v = load_vec<kAligned>(kResidual ? row.residual + i : row.x + i, p.hidden - i);
    store_scaled<kAligned>(p, row_idx, row.out, i, v, inverse);
  }
}

template <class T, bool kAligned, bool kResidual>
void launch_rows(const RmsNormParams& p, Stream stream) {
  const int64_t num_rows = p.outer * p.inner;
  if (p.hidden <= kWarpRowElements) {
    const unsigned grid = unsigned(ceil_div(num_rows, kBlockThreads / kWarpSize));
    launch(rms_norm_kernel<T, kAligned, kResidual, kWarpSize>, {.grid = grid, .block = kBlockThreads, .stream = stream}, p);
  } else {
    launch(rms_norm_kernel<T, kAligned, kResidual, kBlockThreads>,
           {.grid = unsigned(num_rows), .block = kBlockThreads, .smem_bytes = sizeof(SharedStorage), .stream = stream}, p);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned(p.weight, sizeof(float)) &&
                         rows_aligned(p.x, sizeof(T), p.x_outer_stride, p.x_inner_stride) &&
                         rows_aligned(p.residual, sizeof(T), p.residual_outer_stride, p.residual_inner_stride) &&
                         rows_aligned(p.out, sizeof(T), p.out_outer_stride, p.out_inner_stride);
    if (p.residual != nullptr) {
      aligned ? launch_rows<T, true, true>(p, stream) : launch_rows<T, false, true>(p, stream);
    } else {
      aligned ? launch_rows<T, true, false>(p, stream) : launch_rows<T, false, false>(p, stream);
    }
  });
}

}  // namespace tilestream::cuda
