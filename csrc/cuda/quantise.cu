// Rows of activations to int8, for linears whose input no other op has quantised (an attention's output).
//
// A thread takes vectors of 16 bytes, a block of 256 threads a stretch of one row. Memory-bound. No shared
// memory.
#include "cuda/common/quantise.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) quantise_kernel(const __grid_constant__ QuantiseParams p) {
  constexpr int kSize = Vec<T>::kSize;
  const int64_t blocks_per_row = ceil_div(p.k, int64_t(kBlockThreads) * kSize);
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t i = (blockIdx.x % blocks_per_row * kBlockThreads + threadIdx.x) * kSize;
  const Vec<T> x = load_vec<kAligned>(static_cast<const T*>(p.x) + row * p.x_row_stride + i, p.k - i);
  float values[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) values[j] = to_float(x.at[j]);
  store_quantised(p.out, row, p.k, i, values);
}

template <class T, bool kAligned>
void launch_rows(const QuantiseParams& p, Stream stream) {
  const int64_t num_blocks = p.rows * ceil_div(p.k, int64_t(kBlockThreads) * Vec<T>::kSize);
  const LaunchConfig config{.grid = unsigned(num_blocks), .block = kBlockThreads, .stream = stream};
  launch(quantise_kernel<T, kAligned>, config, p);
}

}  // namespace

void quantise(const QuantiseParams& p, Stream stream) {
  with_element(p.x_dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned(p.x, sizeof(T), p.x_row_stride);
    aligned ? launch_rows<T, true>(p, stream) : launch_rows<T, false>(p, stream);
  });
}

}  // namespace tilestream::cuda
