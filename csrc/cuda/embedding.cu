// Rows of a packed weight, dequantised: the embedding table and the output head share one copy.
//
// A warp takes 32 k of one token, a lane one of them; a block of 256 threads 256 k. Bound by the latency of a
// few reads.
#include "cuda/common/packed_format.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

// The weight at (column of the panel, k).
template <PackedFormat F>
__device__ __forceinline__ float weight_at(const unsigned char* panel, int column, int64_t k) {
  if constexpr (F == PackedFormat::kFloat32) {
    return reinterpret_cast<const float*>(panel)[k * kPanelColumns + column];
  } else if constexpr (F == PackedFormat::kBFloat16) {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(panel) + k / 2 * kPanelColumns + column;
    return to_float(k % 2 == 0 ? pairs->x : pairs->y);
  } else {
    using Layout = GroupLayout<F>;
    const unsigned char* group = panel + k / kGroupK * Layout::kBytes;
    const int in_group = int(k % kGroupK), quad = in_group / 4, in_quad = in_group % 4;
    const unsigned char* half = group + column / 16 * Layout::kHalfBytes + column % 16 * 4;
    int code;
    if constexpr (Layout::kFourBit) code = half[quad / 2 * 64 + in_quad] >> 4 * (quad % 2) & 15;
    else code = half[quad * 64 + in_quad];
    const auto* scales = reinterpret_cast<const __half*>(group + Layout::kScaleAt);  // 32, then zeros if any
    const float scale = to_float(scales[column]);
    const float zero =
        Layout::kHasZero ? to_float(scales[kPanelColumns + column]) : -float(Layout::kOffset) * scale;
    return fmaf(float(code), scale, zero);
  }
}

template <PackedFormat F, class T>
__global__ void __launch_bounds__(kBlockThreads) embedding_kernel(const __grid_constant__ EmbeddingParams p) {
  const int64_t blocks_per_row = ceil_div(p.k, int64_t(kBlockThreads));
  const int64_t token = blockIdx.x / blocks_per_row;
  const int64_t k = blockIdx.x % blocks_per_row * kBlockThreads + threadIdx.x;
  if (k >= p.k) return;
  const int64_t id = p.ids[token];
  const auto* panel = static_cast<const unsigned char*>(p.weight) + id / kPanelColumns * panel_bytes(F, p.k);
  static_cast<T*>(p.y)[token * p.k + k] = from_float<T>(weight_at<F>(panel, int(id % kPanelColumns), k));
}

}  // namespace

// Instantiations: 6 formats x 3 element types of y.
void embedding(const EmbeddingParams& p, Stream stream) {
  with_format(p.format, [&](auto format) {
    with_element(p.y_dtype, [&](auto element) {
      const int64_t num_blocks = p.num_tokens * ceil_div(p.k, int64_t(kBlockThreads));
      launch(embedding_kernel<decltype(format)::value, decltype(element)>,
             {.grid = unsigned(num_blocks), .block = kBlockThreads, .stream = stream}, p);
    });
  });
}

}  // namespace tilestream::cuda
