// tilestream::linear, its weight packing, and the embedding lookup: tensors -> checks -> params -> backend.
#include "tilestream/linear.h"

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include "api/checks.h"
#include "api/launch.h"
#include "api/one_device.h"
#include "api/quantised_rows.h"

namespace tilestream::api {
namespace {

PackedFormat check_packed(const at::Tensor& packed, const char* name, int64_t n, int64_t k, int64_t format) {
  TORCH_CHECK_VALUE(format >= 0 && format < kNumPackedFormats, "format is ", format, "; allowed: 0 to ", kNumPackedFormats - 1,
                    " (tilestream.ops.PackedFormat)");
  const auto f = PackedFormat(format);
  check_tensor(packed, name, {at::kByte}, 1);
  TORCH_CHECK_VALUE(n >= 1 && k >= 1, name, " is ", n, " x ", k, "; n and k must be positive");
  TORCH_CHECK_VALUE(!is_quantised(f) || k % kGroupK == 0, "k is ", k, "; group-quantised weights need a multiple of ", kGroupK);
  TORCH_CHECK_VALUE(!is_row_major(f) || k % 8 == 0, "k is ", k, "; row-major weights need a multiple of 8");
  TORCH_CHECK_VALUE(packed.numel() == packed_bytes(f, n, k), name, " has ", packed.numel(), " bytes; ", n, " x ", k,
                    " in format ", format, " takes ", packed_bytes(f, n, k));
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 == 0, name, " must start at a 64-byte boundary");
  return f;
}

Activation activation_of(std::optional<std::string_view> gate) {
  if (!gate.has_value()) return Activation::kNone;
  if (*gate == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(*gate == "gelu_tanh", "gate is '", *gate, "'; allowed: silu, gelu_tanh, or none");
  return Activation::kGeluTanh;
}

// What follows the product.
struct Epilogue {
  std::optional<std::string_view> gate;
  const std::optional<at::Tensor>& residual;
};

void set_epilogue(LinearParams& p, const at::Tensor& out, const Epilogue& epilogue) {
  p.gate = activation_of(epilogue.gate);
  const bool is_gated = p.gate != Activation::kNone;
  TORCH_CHECK_VALUE(!is_gated || p.n % 2 == 0, "n is ", p.n,
                    "; with a gate the weight's rows alternate between gate and up, so it must be even");
  check_size(out, "out", 1, is_gated ? p.n / 2 : p.n, is_gated ? "n / 2, for there is a gate" : "n");
  if (!epilogue.residual.has_value()) return;
  const at::Tensor& residual = *epilogue.residual;
  TORCH_CHECK_VALUE(!is_gated, "gate is '", *epilogue.gate, "' and a residual is given; allowed: one of them");
  check_tensor(residual, "residual", kFloatTypes, 2);
  check_same_dtype(residual, "residual", out, "out");
  TORCH_CHECK_VALUE(residual.sizes() == out.sizes(), "residual has shape ", residual.sizes(), "; it must be that of out, ",
                    out.sizes());
  TORCH_CHECK_VALUE(at::get_overlap_status(residual, out) != at::MemOverlapStatus::Partial,
                    "residual shares a part of out's memory; allowed: all of it in the same order, or none");
  p.residual = residual.const_data_ptr();
  p.residual_row_stride = residual.stride(0);
}

// Everything but the input.
LinearParams linear_params(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& out, int64_t rows,
                           int64_t n, int64_t k, int64_t format, const Epilogue& epilogue) {
  check_tensor(out, "out", kFloatTypes, 2);
  check_size(out, "out", 0, rows, "rows of x");
  LinearParams p{};
  p.format = check_packed(weight, "weight", n, k, format);
  if (bias.has_value()) {
    check_tensor(*bias, "bias", {at::kFloat}, 1);
    check_size(*bias, "bias", 0, n, "n");
  }
  p.weight = weight.const_data_ptr();
  p.bias = optional_data<float>(bias);
  p.y = out.mutable_data_ptr();
  p.m = rows, p.n = n, p.k = k;
  p.y_row_stride = out.stride(0);
  p.dtype = dtype_of(out);
  set_epilogue(p, out, epilogue);
  return p;
}

void linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& out,
            int64_t n, int64_t format, bool gemv, int64_t act_bits, std::optional<std::string_view> gate,
            const std::optional<at::Tensor>& residual) {
  check_tensor(x, "x", kFloatTypes, 2);
  check_same_dtype(out, "out", x, "x");
  LinearParams p = linear_params(weight, bias, out, x.size(0), n, x.size(1), format, {gate, residual});
  p.x = x.const_data_ptr();
  p.x_row_stride = x.stride(0);
  p.gemv = gemv;
  if (is_row_major(p.format)) {
    const auto own = p.format == PackedFormat::kRowsFloat16 ? at::kHalf : at::kBFloat16;
    TORCH_CHECK_TYPE(x.scalar_type() == own, "x has dtype ", x.scalar_type(), "; it must be ", own, " as the row-major weight");
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.m <= 1 || p.x_row_stride % 8 == 0), "x has strides ",
                      x.strides(), "; with a row-major weight its rows must start at multiples of 16 bytes");
  } else {
    TORCH_CHECK_VALUE(!gemv, "gemv is for row-major weights (formats 9 and 10); format is ", format);
  }
  TORCH_CHECK_VALUE(act_bits == 8 || (act_bits == 16 && is_quantised(p.format)), "act_bits is ", act_bits,
                    "; allowed: 8, and 16 for group-quantised weights");
  p.weight_only = act_bits == 16;
  launch(out, cpu::linear, cuda::linear, p);
}

void linear_quant(const at::Tensor& q, const at::Tensor& scale, const at::Tensor& sum, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const at::Tensor& out, int64_t n, int64_t format,
                  std::optional<std::string_view> gate, const std::optional<at::Tensor>& residual) {
  check_tensor(q, "q", {at::kChar}, 2);
  check_tensor(sum, "sum", {at::kInt}, 2);
  const int64_t k = sum.size(1) * kGroupK;
  LinearParams p = linear_params(weight, bias, out, q.size(0), n, k, format, {gate, residual});
  TORCH_CHECK_VALUE(is_quantised(p.format), "format is ", format,
                    "; quantised activations need a group-quantised weight, 2 to 8");
  p.x_q = check_quantised(q, scale, sum, q.size(0), k);
  launch(out, cpu::linear, cuda::linear, p);
}

void pack_gguf(const at::Tensor& rows, int64_t gguf_type, const at::Tensor& packed, int64_t n, int64_t k, int64_t panel_begin,
               int64_t format, int64_t skip) {
  check_tensor(rows, "rows", {at::kByte}, 2);
  TORCH_CHECK_VALUE(format >= 0 && format < kNumPackedFormats, "format is ", format, "; allowed: 0 to ", kNumPackedFormats - 1);
  const auto f = PackedFormat(format);
  check_tensor(packed, "packed", {at::kByte}, 1);
  check_size(rows, "rows", 0, n, "n");
  const int64_t end = panel_begin + ceil_div(n, kPanelColumns);
  TORCH_CHECK_VALUE(panel_begin >= 0 && packed_bytes(f, panel_begin * kPanelColumns + n, k) <= packed.numel(), "packed has ",
                    packed.numel(), " bytes; panels ", panel_begin, " to ", end - 1, " of ", panel_bytes(f, k),
                    " bytes do not fit");
  struct Known { GgufType type; int64_t block, bytes; PackedFormat packed; };
  constexpr Known kKnown[] = {
      {GgufType::kF32, 1, 4, PackedFormat::kFloat32},      {GgufType::kF16, 1, 2, PackedFormat::kBFloat16},
      {GgufType::kBF16, 1, 2, PackedFormat::kBFloat16},    {GgufType::kQ4_0, 32, 18, PackedFormat::kU4G32S},
      {GgufType::kQ4_1, 32, 20, PackedFormat::kU4G32},     {GgufType::kQ8_0, 32, 34, PackedFormat::kU8G32S},
      {GgufType::kQ4_K, 256, 144, PackedFormat::kU4G32},   {GgufType::kQ5_K, 256, 176, PackedFormat::kU8G32},
      {GgufType::kQ6_K, 256, 210, PackedFormat::kU8G32S},
  };
  const Known* known = nullptr;
  for (const Known& candidate : kKnown) {
    if (int64_t(candidate.type) == gguf_type) known = &candidate;
  }
  TORCH_CHECK_VALUE(known != nullptr, "gguf_type is ", gguf_type,
                    "; supported: F32 (0), F16 (1), Q4_0 (2), Q4_1 (3), Q8_0 (8), Q4_K (12), Q5_K (13), Q6_K (14), BF16 (30)");
  const int64_t unit = std::min<int64_t>(known->block, kGroupK);
  TORCH_CHECK_VALUE(k % unit == 0, "k is ", k, "; this GGUF type needs a multiple of ", unit);
  TORCH_CHECK_VALUE(skip >= 0 && skip < known->block && skip % unit == 0, "skip is ", skip,
                    "; this GGUF type needs a multiple of ", unit, " from 0 to ", known->block - unit);
  check_size(rows, "rows", 1, ceil_div(skip + k, known->block) * known->bytes, "bytes of the blocks of one row");
  TORCH_CHECK_VALUE(f == known->packed || !is_quantised(f), "format is ", format, "; this GGUF type packs to ",
                    int(known->packed), ", 0, 1, 9 or 10");
  PackGgufParams p{};
  p.rows = rows.const_data_ptr<uint8_t>();
  p.row_bytes = rows.stride(0);
  p.packed = packed.mutable_data_ptr();
  p.n = n, p.k = k, p.panel_begin = panel_begin, p.skip = skip;
  p.type = known->type;
  p.format = f;
  Program::launch(cpu::pack_gguf, p);
}

void pack_weight(const std::optional<at::Tensor>& values, const std::optional<at::Tensor>& q,
                 const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero, int64_t group,
                 const at::Tensor& packed, int64_t n, int64_t k, int64_t format) {
  PackParams p{};
  p.format = check_packed(packed, "packed", n, k, format);
  p.packed = packed.mutable_data_ptr();
  p.n = n, p.k = k, p.group = group;
  if (!is_quantised(p.format)) {
    TORCH_CHECK_VALUE(values.has_value() && !q.has_value(), "formats 0, 1, 9 and 10 are packed from values, not from q");
    check_tensor(*values, "values", {at::kFloat}, 2);
    check_contiguous(*values, "values");
    check_size(*values, "values", 0, n, "n");
    check_size(*values, "values", 1, k, "k");
    p.values = values->const_data_ptr<float>();
  } else {
    TORCH_CHECK_VALUE(q.has_value() && scale.has_value() && !values.has_value(),
                      "group-quantised formats are packed from q and scale, not from values");
    TORCH_CHECK_VALUE(group >= 1 && group % group_k(p.format) == 0, "group is ", group, "; allowed for format ", format,
                      ": multiples of ", group_k(p.format));
    TORCH_CHECK_VALUE(has_zero(p.format) == zero.has_value(), "zero is ", zero.has_value() ? "given" : "missing", " for format ",
                      format, "; the symmetric formats (2, 4, 6, 8) have none, the others need it");
    check_tensor(*q, "q", {at::kByte}, 2);
    check_contiguous(*q, "q");
    check_size(*q, "q", 0, n, "n");
    check_size(*q, "q", 1, k, "k");
    for (const auto& [t, name] : {std::pair{&scale, "scale"}, {&zero, "zero"}}) {
      if (!t->has_value()) continue;
      check_tensor(**t, name, {at::kFloat}, 2);
      check_contiguous(**t, name);
      check_size(**t, name, 0, n, "n");
      check_size(**t, name, 1, ceil_div(k, group), "k / group, rounded up");
    }
    if (is_four_bit(p.format)) check_range(*q, q->const_data_ptr<uint8_t>(), q->numel(), "q", 0, 16);
    p.q = q->const_data_ptr<uint8_t>();
    p.scale = scale->const_data_ptr<float>();
    p.zero = optional_data<float>(zero);
  }
  Program::launch(cpu::pack_weight, p);
}

void embedding(const at::Tensor& ids, const at::Tensor& weight, const at::Tensor& out, int64_t n, int64_t format) {
  check_tensor(ids, "ids", {at::kLong}, 1);
  check_tensor(out, "out", kFloatTypes, 2);
  check_contiguous(out, "out");
  check_size(out, "out", 0, ids.size(0), "num_tokens");
  EmbeddingParams p{};
  p.format = check_packed(weight, "weight", n, out.size(1), format);
  p.ids = ids.const_data_ptr<int64_t>();
  check_range(ids, p.ids, ids.size(0), "ids", 0, n);
  p.weight = weight.const_data_ptr();
  p.y = out.mutable_data_ptr();
  p.num_tokens = ids.size(0), p.n = n, p.k = out.size(1);
  p.y_dtype = dtype_of(out);
  launch(ids, cpu::embedding, cuda::embedding, p);
}

void implement(torch::Library& m) {
  impl<"linear", linear>(m);
  impl<"linear_quant", linear_quant>(m);
  impl<"embedding", embedding>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, *, int n, int format, bool gemv=False, int act_bits=8, "
        "str? gate=None, Tensor? residual=None) -> ()");
  m.def("linear_quant(Tensor q, Tensor scale, Tensor sum, Tensor weight, Tensor? bias, Tensor(a!) out, *, int n, int format, "
        "str? gate=None, Tensor? residual=None) -> ()");
  m.def(
      "pack_gguf(Tensor rows, int gguf_type, Tensor(a!) packed, *, int n, int k, int panel_begin, int format, int skip=0) -> ()");
  m.def(
      "pack_weight(Tensor? values, Tensor? q, Tensor? scale, Tensor? zero, int group, Tensor(a!) packed, *, int n, int k, int "
      "format) -> ()");
  m.def("embedding(Tensor ids, Tensor weight, Tensor(a!) out, *, int n, int format) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) {
  implement(m);
  m.impl("pack_gguf", pack_gguf);  // a GPU's weights are packed on the host too
  m.impl("pack_weight", pack_weight);  // a GPU's weights are packed on the host too
}
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
