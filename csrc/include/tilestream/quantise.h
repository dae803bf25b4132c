// Activations as integers: what the linears on group-quantised weights multiply.
//
// One scale per row and span of kScaleK consecutive k (the last of a row may be shorter): value = q * scale, q rounded to
// nearest even. A row's first k4 elements are INT4, the others INT8: COMET's blocks (2410.12168, section 4), whose channels
// are permuted offline so that those with outliers come last. With amax a span's largest magnitude,
//   INT8: scale = amax / 127, q = round(value * 127 / amax);
//   INT4: scale = amax / -8 if a value of that magnitude is positive, else amax / 8; q = min(round(value / scale), 7).
// So the value of largest magnitude is -8, and steps are an eighth finer than with 7 on both sides: a quarter less squared
// error (GGUF's Q4_0 has weights so). Beside them the sum of q over each group of kGroupK, which is all that a weight's zero
// point meets of a row. A span with a NaN or an infinity gets scale NaN, so that all of the row's outputs are NaN and no
// other row notices.
// A row's bytes: k4 / 2 of nibbles (two's complement; in 32 k, byte j has k = j in its low half and k = 16 + j in its
// high one, as the weights of linear.h), then k - k4 int8.
#pragma once

#include "tilestream/types.h"

namespace tilestream {

constexpr int kGroupK = 32;   // of k: all lengths of rows are multiples of it
constexpr int kScaleK = 128;  // consecutive k of an activation row that share a scale
constexpr float kInt4Levels = 8.0f, kInt4Most = 7.0f, kInt8Levels = 127.0f;

struct QuantisedRows {
  int8_t* q;     // [rows, row_bytes(k)]
  float* scale;  // [rows, ceil(k / kScaleK)]
  int32_t* sum;  // [rows, k / kGroupK]; all three contiguous
  int64_t k4;    // a multiple of kScaleK; 0: all INT8
  TILESTREAM_HOST_DEVICE int64_t row_bytes(int64_t k) const { return k - k4 / 2; }
};

// Bytes of the three arrays with INT8 alone.
TILESTREAM_HOST_DEVICE constexpr int64_t quantised_bytes(int64_t rows, int64_t k) {
  return rows * (k + 4 * ceil_div(k, kScaleK) + 4 * (k / kGroupK));
}

// With `hadamard` every kScaleK elements are first multiplied by the orthogonal Hadamard matrix of their number (Sylvester's):
// a few outliers become a part of all of them (QuaRot, 2404.00456). k is then a multiple of kScaleK.
struct QuantiseParams {
  const void* x;  // [rows, k], dtype; last dim contiguous
  QuantisedRows out;
  void* y;        // [rows, k], dtype; last dim contiguous, may be x: gets the turned rows, and `out` is not used; or null
  int64_t rows, k, x_row_stride, y_row_stride;
  DType dtype;
  bool hadamard;  // true where y is given
};

namespace cpu {
void quantise(const QuantiseParams& params);
}  // namespace cpu

namespace cuda {
void quantise(const QuantiseParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
