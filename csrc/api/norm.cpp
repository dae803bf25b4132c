// tilestream::rms_norm, fused_add_rms_norm, silu_and_mul, gelu_tanh_and_mul: tensors -> checks -> params -> backend.
#include "tilestream/norm.h"

#include <torch/library.h>

#include "api/checks.h"
#include "api/program.h"

namespace tilestream::api {
namespace {

struct Rows { int64_t outer, inner, outer_stride, inner_stride; };

// [num_tokens, hidden] or [num_tokens, num_heads, hidden], outer dimensions with any stride.
Rows check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2 || t.dim() == 3, name, " has shape ", t.sizes(), "; it needs [num_tokens, hidden] or [num_tokens, num_heads, hidden]");
  check_tensor(t, name, kFloatTypes, t.dim());
  if (t.dim() == 2) return {t.size(0), 1, t.stride(0), 0};
  return {t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

RmsNormParams norm_params(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& out, double eps) {
  const Rows in = check_rows(x, "x"), to = check_rows(out, "out");
  check_same_dtype(out, "out", x, "x");
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), "out has shape ", out.sizes(), "; it must be that of x, ", x.sizes());
  check_tensor(weight, "weight", {at::kFloat}, 1);
  check_size(weight, "weight", 0, x.size(-1), "the last dimension of x");
  RmsNormParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  p.outer = in.outer, p.inner = in.inner, p.hidden = x.size(-1);
  p.x_outer_stride = in.outer_stride, p.x_inner_stride = in.inner_stride;
  p.out_outer_stride = to.outer_stride, p.out_inner_stride = to.inner_stride;
  p.eps = float(eps);
  p.dtype = dtype_of(x);
  return p;
}

void rms_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& out, double eps) {
  Program::launch(cpu::rms_norm, norm_params(x, weight, out, eps));
}

void fused_add_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  RmsNormParams p = norm_params(x, weight, x, eps);
  const Rows r = check_rows(residual, "residual");
  check_same_dtype(residual, "residual", x, "x");
  TORCH_CHECK_VALUE(residual.sizes() == x.sizes(), "residual has shape ", residual.sizes(), "; it must be that of x, ", x.sizes());
  p.residual = residual.mutable_data_ptr();
  p.residual_outer_stride = r.outer_stride, p.residual_inner_stride = r.inner_stride;
  Program::launch(cpu::rms_norm, p);
}

void act_and_mul(const at::Tensor& x, const at::Tensor& out, Activation activation) {
  check_tensor(x, "x", kFloatTypes, 2);
  check_tensor(out, "out", kFloatTypes, 2);
  check_same_dtype(out, "out", x, "x");
  TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "x has shape ", x.sizes(), "; its last dimension holds gate and up, so it must be even");
  check_size(out, "out", 0, x.size(0), "rows of x");
  check_size(out, "out", 1, x.size(1) / 2, "half of x");
  ActAndMulParams p{};
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.num_tokens = x.size(0), p.hidden = x.size(1) / 2;
  p.x_row_stride = x.stride(0), p.out_row_stride = out.stride(0);
  p.dtype = dtype_of(x);
  p.activation = activation;
  Program::launch(cpu::act_and_mul, p);
}

void silu_and_mul(const at::Tensor& x, const at::Tensor& out) { act_and_mul(x, out, Activation::kSilu); }
void gelu_tanh_and_mul(const at::Tensor& x, const at::Tensor& out) { act_and_mul(x, out, Activation::kGeluTanh); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor(a!) out, *, float eps) -> ()");
  m.def("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, *, float eps) -> ()");
  m.def("silu_and_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("gelu_tanh_and_mul(Tensor x, Tensor(a!) out) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("fused_add_rms_norm", fused_add_rms_norm);
  m.impl("silu_and_mul", silu_and_mul);
  m.impl("gelu_tanh_and_mul", gelu_tanh_and_mul);
}

}  // namespace tilestream::api
