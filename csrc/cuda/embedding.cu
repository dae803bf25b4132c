// Rows of a packed weight, dequantised: the embedding table and the output head share one copy.
//
// A thread takes 8 k of one token: 16 bytes of a row-major weight, else a word or two for each 4 k, or a word
// for each pair or single k of the float panels. Memory-bound: a panel's other columns come along, since a
// sector of 32 bytes has 8 of its 32 columns. No shared memory.
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kRun = 8;  // consecutive k of a thread

// Weights (column of the panel, k .. k + 7), those past p.k undefined.
template <PackedFormat F>
__device__ __forceinline__ void load_run(const EmbeddingParams& p, const unsigned char* panel, int column,
                                         int64_t k, float (&values)[kRun]) {
  if constexpr (is_row_major(F)) {
    using T = std::conditional_t<F == PackedFormat::kRowsFloat16, __half, __nv_bfloat16>;
    const auto run = *reinterpret_cast<const Vec<T>*>(reinterpret_cast<const T*>(panel) + column * p.k + k);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = to_float(run.at[i]);
  } else if constexpr (F == PackedFormat::kFloat32) {
    const float* const at = reinterpret_cast<const float*>(panel) + k * kPanelColumns + column;
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = k + i < p.k ? at[i * kPanelColumns] : 0.0f;
  } else if constexpr (F == PackedFormat::kBFloat16) {
    const auto* const at = reinterpret_cast<const __nv_bfloat162*>(panel) + k / 2 * kPanelColumns + column;
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      const __nv_bfloat162 pair = k + i < p.k ? at[i / 2 * kPanelColumns] : __nv_bfloat162{};
      values[i] = to_float(pair.x), values[i + 1] = to_float(pair.y);
    }
  } else {
    using Layout = GroupLayout<F>;
    const int64_t g = k / group_k(F);
    const unsigned char* const group = panel + g * Layout::kBytes;
    const unsigned char* const part = group + k % group_k(F) / kGroupK * Layout::kCodeBytes;
    // Of the 8 k, words of 4: 16 of 32 k are the low nibbles of four words, or four words of their own.
    const int word = int(k % 16) / 4, high = int(k % kGroupK) / 16;
    const unsigned char* const at = part + column / 16 * Layout::kHalfBytes + column % 16 * 4 + 64 * word;
    const auto* const scales =
        reinterpret_cast<const __half*>(group + Layout::parts(p.k, g) * Layout::kCodeBytes);  // 32, then zeros
    const float scale = to_float(scales[column]);
    const float zero =
        Layout::kHasZero ? to_float(scales[kPanelColumns + column]) : -float(Layout::kOffset) * scale;
    unsigned words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[i] = *reinterpret_cast<const unsigned*>(at + 64 * i + (Layout::kFourBit ? 0 : 256 * high));
      if constexpr (Layout::kFourBit) words[i] >>= 4 * high;
    }
    constexpr unsigned kMask = Layout::kFourBit ? 15 : 255;
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = fmaf(float(words[i / 4] >> 8 * (i % 4) & kMask), scale, zero);
  }
}

// Blocks: (tokens, stretches of 1,024 k).
template <PackedFormat F, class T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) embedding_kernel(const __grid_constant__ EmbeddingParams p) {
  const int64_t token = blockIdx.x, k = (int64_t(blockIdx.y) * kBlockThreads + threadIdx.x) * kRun;
  if (k >= p.k) return;
  const int64_t id = p.ids[token];
  const auto* panel = static_cast<const unsigned char*>(p.weight) + id / kPanelColumns * panel_bytes(F, p.k);
  float values[kRun];
  load_run<F>(p, panel, int(id % kPanelColumns), k, values);
  T* const y = static_cast<T*>(p.y) + token * p.k + k;
#pragma unroll
  for (int j = 0; j < kRun; j += Vec<T>::kSize) {
    Vec<T> out;
#pragma unroll
    for (int l = 0; l < Vec<T>::kSize; ++l) out.at[l] = from_float<T>(values[j + l]);
    store_vec<kAligned>(y + j, out, p.k - k - j);
  }
}

}  // namespace

// Instantiations: 11 formats x 3 element types of y, rows of y aligned or not.
void embedding(const EmbeddingParams& p, Stream stream) {
  with_format(p.format, [&](auto format) {
    with_element(p.y_dtype, [&](auto element) {
      constexpr PackedFormat kFormat = decltype(format)::value;
      using T = decltype(element);
      const dim3 grid(unsigned(p.num_tokens), unsigned(ceil_div(p.k, kBlockThreads * kRun)));
      const LaunchConfig config{.grid = grid, .block = kBlockThreads, .stream = stream};
      if (rows_aligned(p.y, sizeof(T), p.k)) launch(embedding_kernel<kFormat, T, true>, config, p);
      else launch(embedding_kernel<kFormat, T, false>, config, p);
    });
  });
}

}  // namespace tilestream::cuda
