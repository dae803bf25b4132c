// What follows a linear's sums, in float32, before the one rounding to y: (sum + bias) + residual, or with a gate
// act(sum + bias) * (sum + bias) of neighbouring columns. The same for every kernel, so that a row's bits are.
//
// The thread that stores an output has both of its columns and reads its residual, which may lie in the same place.
#pragma once

#include "cuda/common/activation.cuh"
#include "cuda/common/vec.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {

TILESTREAM_HOST_DEVICE constexpr bool is_gated(const LinearParams& p) { return p.gate != Activation::kNone; }
// Columns of x . W^T that make one of y.
TILESTREAM_HOST_DEVICE constexpr int columns_per_output(const LinearParams& p) { return is_gated(p) ? 2 : 1; }

__device__ __forceinline__ float bias_of(const LinearParams& p, int64_t n) {
  return p.bias != nullptr ? static_cast<const float*>(p.bias)[n] : 0.0f;
}

// Of sums with their biases.
__device__ __forceinline__ float gated(const LinearParams& p, float gate, float up) {
  return activate(p.gate, p.dtype != DType::kFloat32, gate) * up;
}

// The output that begins with column n of x . W^T; sum_of(n) is that column of this row.
template <class SumOf>
__device__ __forceinline__ void store_output(const LinearParams& p, int64_t row, int64_t n, SumOf sum_of) {
  float y = sum_of(n) + bias_of(p, n);
  if (is_gated(p)) {
    y = gated(p, y, sum_of(n + 1) + bias_of(p, n + 1));
    n /= 2;
  } else if (p.residual != nullptr) {
    y += load_as(p.dtype, p.residual, row * p.residual_row_stride + n);
  }
  store_as(p.dtype, p.y, row * p.y_row_stride + n, y);
}

// All outputs of the columns that there are of n .. n + kColumns - 1, n even.
template <int kColumns>
__device__ __forceinline__ void store_outputs(const LinearParams& p, int64_t row, int64_t n, const float (&sums)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int next = min(c + 1, kColumns - 1);
    if (n + c < p.n && (c % 2 == 0 || !is_gated(p)))
      store_output(p, row, n + c, [&](int64_t column) { return column == n + c ? sums[c] : sums[next]; });
  }
}

}  // namespace tilestream::cuda
