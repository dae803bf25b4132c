// Activations as integers: what the linears on group-quantised weights multiply.
//
// Symmetric int8 per row: value = q * scale, q = round(value * 127 / amax) to nearest even, one scale = amax / 127
// for kScaleK consecutive k (the last of a row may be shorter). Beside them the sum of q over each group of kGroupK,
// which is all that a weight's zero point meets of a row. A span with a NaN or an infinity gets scale NaN, so that all
// of the row's outputs are NaN and no other row notices.
#pragma once

#include "tilestream/types.h"

namespace tilestream {

constexpr int kGroupK = 32;   // consecutive k of a weight that share a scale and a zero
constexpr int kScaleK = 128;  // consecutive k of an activation row that share a scale

struct QuantisedRows {
  int8_t* q;     // [rows, k], k a multiple of kGroupK
  float* scale;  // [rows, ceil(k / kScaleK)]
  int32_t* sum;  // [rows, k / kGroupK]; all three contiguous
};

// Bytes of the three arrays.
TILESTREAM_HOST_DEVICE constexpr int64_t quantised_bytes(int64_t rows, int64_t k) {
  return rows * (k + 4 * ceil_div(k, kScaleK) + 4 * (k / kGroupK));
}

struct QuantiseParams {
  const void* x;  // [rows, k], x_dtype; last dim contiguous
  QuantisedRows out;
  int64_t rows, k, x_row_stride;
  DType x_dtype;
};

namespace cpu {
void quantise(const QuantiseParams& params);
}  // namespace cpu

namespace cuda {
void quantise(const QuantiseParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
