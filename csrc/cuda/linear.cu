// y = x . W^T + bias on packed weights: which kernel for which format.
//
//   groups of 32 and 128               common/linear_int8_kernels.cuh; rows of floats are quantised first
//   groups of 128 on Hopper            linear_sm90.cu, rows of integers
//   the same with weight_only          common/linear_weight_only.cuh
//   kBFloat16, kFloat32                common/linear_float.cuh
//   kRowsBFloat16, kRowsFloat16        common/linear_rows.cuh, common/linear_gemv.cuh, as the caller chooses
#include <stdexcept>
#include <string>

#include "cuda/common/linear_float.cuh"
#include "cuda/common/linear_gemv.cuh"
#include "cuda/common/linear_int8_kernels.cuh"
#include "cuda/common/linear_rows.cuh"
#include "cuda/common/linear_weight_only.cuh"
#include "cuda/linear_sm90.h"
#include "cuda/runtime.cuh"
#include "tilestream/linear.h"
#include "tilestream/quantise.h"

namespace tilestream::cuda {
namespace {

// The m rows in the workspace.
QuantisedRows workspace_rows(const LinearParams& p) {
  auto* q = static_cast<int8_t*>(p.workspace) + partial_bytes(p);
  auto* sum = reinterpret_cast<int32_t*>(q + p.m * p.k);
  return {q, reinterpret_cast<float*>(sum + p.m * (p.k / kGroupK)), sum, 0};
}

}  // namespace

void linear(const LinearParams& p, Stream stream) {
  if (p.m == 0 || p.n == 0) return;
  if (p.weight_only) return launch_weight_only(p, stream);
  with_format(p.format, [&](auto format) {
    constexpr PackedFormat kFormat = decltype(format)::value;
    if constexpr (is_row_major(kFormat)) {
      using T = std::conditional_t<kFormat == PackedFormat::kRowsFloat16, __half, __nv_bfloat16>;
      p.gemv ? launch_gemv<T>(p, stream) : launch_rows<T>(p, stream);
    } else if constexpr (!is_quantised(kFormat)) {
      launch_float<kFormat>(p, stream);
    } else {
      if (p.x_q.k4 > 0 && !takes_int4(kFormat))
        throw std::invalid_argument("linear: format is " + std::to_string(int(kFormat)) +
                                    "; INT4 activations meet formats 6 and 7 (4 bits, groups of 128) on a GPU");
      LinearParams with_rows = p;
      if (p.x_q.q == nullptr) {
        with_rows.x_q = workspace_rows(p);
        quantise({.x = p.x, .out = with_rows.x_q, .rows = p.m, .k = p.k, .x_row_stride = p.x_row_stride, .dtype = p.dtype},
                 stream);
      }
      if constexpr (group_k(kFormat) != kGroupK) {
        if (linear_sm90(with_rows, stream)) return;
      }
      launch_int8<kFormat>(with_rows, stream);
    }
  });
}

}  // namespace tilestream::cuda
