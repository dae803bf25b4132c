// Norms and gated activations, to floats or to int8 rows: tensors -> checks -> params -> backend.
#include "tilestream/norm.h"

#include <torch/library.h>

#include "api/checks.h"
#include "api/launch.h"
#include "api/one_device.h"
#include "api/quantised_rows.h"

namespace tilestream::api {
namespace {

struct Rows { int64_t outer, inner, outer_stride, inner_stride; };

// [num_tokens, hidden] or [num_tokens, num_heads, hidden], outer dimensions with any stride.
Rows check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 || t.dim() == 3, name, " has shape ", t.sizes(),
                    "; it needs [num_tokens, hidden] or [num_tokens, num_heads, hidden]");
  check_tensor(t, name, kFloatTypes, t.dim());
  if (t.dim() == 2) return {t.size(0), 1, t.stride(0), 0};
  return {t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Everything but the output.
RmsNormParams norm_params(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const Rows in = check_rows(x, "x");
  check_tensor(weight, "weight", {at::kFloat}, 1);
  check_size(weight, "weight", 0, x.size(-1), "the last dimension of x");
  RmsNormParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.outer = in.outer, p.inner = in.inner, p.hidden = x.size(-1);
  p.x_outer_stride = in.outer_stride, p.x_inner_stride = in.inner_stride;
  p.eps = float(eps);
  p.dtype = dtype_of(x);
  return p;
}

void set_out(RmsNormParams& p, const at::Tensor& out, const at::Tensor& x) {
  const Rows to = check_rows(out, "out");
  check_same_dtype(out, "out", x, "x");
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), "out has shape ", out.sizes(), "; it must be that of x, ", x.sizes());
  p.out = out.mutable_data_ptr();
  p.out_outer_stride = to.outer_stride, p.out_inner_stride = to.inner_stride;
}

void set_residual(RmsNormParams& p, const at::Tensor& residual, const at::Tensor& x) {
  const Rows r = check_rows(residual, "residual");
  check_same_dtype(residual, "residual", x, "x");
  TORCH_CHECK_VALUE(residual.sizes() == x.sizes(), "residual has shape ", residual.sizes(), "; it must be that of x, ",
                    x.sizes());
  p.residual = residual.mutable_data_ptr();
  p.residual_outer_stride = r.outer_stride, p.residual_inner_stride = r.inner_stride;
}

void rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& out, double eps) {
  RmsNormParams p = norm_params(x, weight, eps);
  set_out(p, out, x);
  launch(x, cpu::rms_norm, cuda::rms_norm, p);
}

void fused_add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  RmsNormParams p = norm_params(x, weight, eps);
  set_out(p, x, x);
  set_residual(p, residual, x);
  launch(x, cpu::rms_norm, cuda::rms_norm, p);
}

void rms_norm_quant(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& q, const at::Tensor& scale,
                    const at::Tensor& sum, double eps) {
  RmsNormParams p = norm_params(x, weight, eps);
  TORCH_CHECK_VALUE(x.dim() == 2, "x has shape ", x.sizes(), "; it needs [num_tokens, hidden]");
  p.quantised = check_quantised(q, scale, sum, x.size(0), x.size(1));
  launch(x, cpu::rms_norm, cuda::rms_norm, p);
}

void fused_add_rms_norm_quant(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, const at::Tensor& q,
                              const at::Tensor& scale, const at::Tensor& sum, double eps) {
  RmsNormParams p = norm_params(x, weight, eps);
  TORCH_CHECK_VALUE(x.dim() == 2, "x has shape ", x.sizes(), "; it needs [num_tokens, hidden]");
  set_residual(p, residual, x);
  p.quantised = check_quantised(q, scale, sum, x.size(0), x.size(1));
  launch(x, cpu::rms_norm, cuda::rms_norm, p);
}

// Everything but the output.
ActAndMulParams act_params(const at::Tensor& x, Activation activation) {
  check_tensor(x, "x", kFloatTypes, 2);
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "x has shape ", x.sizes(), "; its last dimension holds gate and up, so it must be even");
  ActAndMulParams p{};
  p.x = x.const_data_ptr();
  p.num_tokens = x.size(0), p.hidden = x.size(1) / 2;
  p.x_row_stride = x.stride(0);
  p.dtype = dtype_of(x);
  p.activation = activation;
  return p;
}

template <Activation A>
void act_and_mul(const at::Tensor& x, const at::Tensor& out) {
  ActAndMulParams p = act_params(x, A);
  check_tensor(out, "out", kFloatTypes, 2);
  check_same_dtype(out, "out", x, "x");
  check_size(out, "out", 0, x.size(0), "rows of x");
  check_size(out, "out", 1, p.hidden, "half of x");
  p.out = out.mutable_data_ptr();
  p.out_row_stride = out.stride(0);
  launch(x, cpu::act_and_mul, cuda::act_and_mul, p);
}

template <Activation A>
void act_and_mul_quant(const at::Tensor& x, const at::Tensor& q, const at::Tensor& scale, const at::Tensor& sum) {
  ActAndMulParams p = act_params(x, A);
  p.quantised = check_quantised(q, scale, sum, p.num_tokens, p.hidden);
  launch(x, cpu::act_and_mul, cuda::act_and_mul, p);
}

QuantiseParams rows_params(const at::Tensor& x, bool hadamard) {
  check_tensor(x, "x", kFloatTypes, 2);
  TORCH_CHECK_VALUE(!hadamard || x.size(1) % kScaleK == 0, "x has shape ", x.sizes(),
                    "; with hadamard dimension 1 must be a multiple of ", kScaleK);
  QuantiseParams p{};
  p.x = x.const_data_ptr();
  p.rows = x.size(0), p.k = x.size(1), p.x_row_stride = x.stride(0);
  p.dtype = dtype_of(x);
  p.hadamard = hadamard;
  return p;
}

void quantise(const at::Tensor& x, const at::Tensor& q, const at::Tensor& scale, const at::Tensor& sum, bool hadamard) {
  QuantiseParams p = rows_params(x, hadamard);
  p.out = check_quantised(q, scale, sum, p.rows, p.k);
  launch(x, cpu::quantise, cuda::quantise, p);
}

void hadamard(const at::Tensor& x, const at::Tensor& out) {
  QuantiseParams p = rows_params(x, true);
  check_tensor(out, "out", kFloatTypes, 2);
  check_same_dtype(out, "out", x, "x");
  check_size(out, "out", 0, p.rows, "rows of x");
  check_size(out, "out", 1, p.k, "k");
  p.y = out.mutable_data_ptr();
  p.y_row_stride = out.stride(0);
  launch(x, cpu::quantise, cuda::quantise, p);
}

void implement(torch::Library& m) {
  impl<"rms_norm", rms_norm>(m);
  impl<"rms_norm_quant", rms_norm_quant>(m);
  impl<"fused_add_rms_norm", fused_add_rms_norm>(m);
  impl<"fused_add_rms_norm_quant", fused_add_rms_norm_quant>(m);
  impl<"silu_and_mul", act_and_mul<Activation::kSilu>>(m);
  impl<"silu_and_mul_quant", act_and_mul_quant<Activation::kSilu>>(m);
  impl<"gelu_tanh_and_mul", act_and_mul<Activation::kGeluTanh>>(m);
  impl<"gelu_tanh_and_mul_quant", act_and_mul_quant<Activation::kGeluTanh>>(m);
  impl<"quantise", quantise>(m);
  impl<"hadamard", hadamard>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor(a!) out, *, float eps) -> ()");
  m.def("rms_norm_quant(Tensor x, Tensor weight, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) sum, *, float eps) -> ()");
  m.def("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, *, float eps) -> ()");
  m.def(
      "fused_add_rms_norm_quant(Tensor x, Tensor(a!) residual, Tensor weight, Tensor(b!) q, Tensor(c!) scale, Tensor(d!) sum, *, "
      "float eps) -> ()");
  m.def("silu_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("silu_and_mul_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) sum) -> ()");
  m.def("gelu_tanh_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_tanh_and_mul_quant(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) sum) -> ()");
  m.def("quantise(Tensor x, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) sum, *, bool hadamard=False) -> ()");
  m.def("hadamard(Tensor x, Tensor(a!) out) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
