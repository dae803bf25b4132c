// RMS normalisation and gated activations, row by row; the result as floats or, for a linear that takes it, as int8.
#pragma once

#include "tilestream/activation.h"
#include "tilestream/quantise.h"

namespace tilestream {

// out = x * rsqrt(mean(x^2) + eps) * weight. With residual: residual += x first, and the norm is of residual.
struct RmsNormParams {
  const void* x;       // [outer, inner, hidden] through strides; last dim contiguous
  void* residual;      // as x, or null; updated in place
  const float* weight; // [hidden]
  void* out;           // may be x; null where quantised is given
  QuantisedRows quantised;  // [outer, hidden], inner = 1; q null where out is given
  int64_t outer, inner, hidden;  // a 2-D input has inner = 1; [T, H, D] views of a fused QKV have inner = H
  int64_t x_outer_stride, x_inner_stride, residual_outer_stride, residual_inner_stride, out_outer_stride, out_inner_stride;
  float eps;
  DType dtype;
};

// out[t, i] = act(x[t, i]) * x[t, hidden + i]
struct ActAndMulParams {
  const void* x;  // [num_tokens, 2 * hidden]; last dim contiguous
  void* out;      // [num_tokens, hidden]; null where quantised is given
  QuantisedRows quantised;  // [num_tokens, hidden]; q null where out is given
  int64_t num_tokens, hidden, x_row_stride, out_row_stride;
  DType dtype;
  Activation activation;  // not kNone
};

namespace cpu {
void rms_norm(const RmsNormParams& params);
void act_and_mul(const ActAndMulParams& params);
}  // namespace cpu

namespace cuda {
void rms_norm(const RmsNormParams& params, Stream stream);
void act_and_mul(const ActAndMulParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
