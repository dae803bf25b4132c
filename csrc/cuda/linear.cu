// y = x . W^T + bias on packed weights: which kernel for which format.
//
//   kU4G32S, kU4G32, kU8G32S, kU8G32   common/linear_int8_kernels.cuh; rows of floats are quantised first
//   kU4G128S, kU4G128, kU8G128S        linear_sm90.cu, rows of integers
//   kBFloat16, kFloat32                common/linear_float.cuh
//   kRowsBFloat16, kRowsFloat16        common/linear_rows.cuh, common/linear_gemv.cuh, as the caller chooses
#include <stdexcept>

#include "cuda/common/linear_float.cuh"
#include "cuda/common/linear_gemv.cuh"
#include "cuda/common/linear_int8_kernels.cuh"
#include "cuda/common/linear_rows.cuh"
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
  with_format(p.format, [&](auto format) {
    constexpr PackedFormat kFormat = decltype(format)::value;
    if constexpr (is_row_major(kFormat)) {
      using T = std::conditional_t<kFormat == PackedFormat::kRowsFloat16, __half, __nv_bfloat16>;
      p.gemv ? launch_gemv<T>(p, stream) : launch_rows<T>(p, stream);
    } else if constexpr (!is_quantised(kFormat)) {
      launch_float<kFormat>(p, stream);
    } else {
      LinearParams with_rows = p;
      if (p.x_q.q == nullptr) {
        with_rows.x_q = workspace_rows(p);
        quantise({p.x, with_rows.x_q, p.m, p.k, p.x_row_stride, p.dtype}, stream);
      }
      if constexpr (group_k(kFormat) == kGroupK) launch_int8<kFormat>(with_rows, stream);
      else if (p.weight_only || !linear_sm90(with_rows, stream))
        throw std::invalid_argument("linear: weights in groups of 128 are multiplied on Hopper GPUs alone, by quantised rows");
    }
  });
}

}  // namespace tilestream::cuda
