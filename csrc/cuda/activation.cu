// Gated activations: out = act(gate) * up, the two halves of a row.
//
// A thread takes two vectors of 16 bytes, a block of 256 threads a stretch of one row. Memory-bound: the roof
// is a copy of the same bytes (two read, one written). With 8 blocks an SM has 64 KB under way, where an
// H200's 4.8 TB/s with a latency of 1 us (an estimate) ask for 24 KB of reads; and 300 instructions for each
// 1.5 KB of a warp, which exact division and exponential, or a division of indices, would take up: 16-bit
// elements get the fast ones. No shared memory.
#include "cuda/common/activation.cuh"
#include "cuda/common/quantise.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"
#include "tilestream/norm.h"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;

// Blocks: (tokens, stretches of a row).
template <class T, bool kAligned, Activation kActivation>
__global__ void __launch_bounds__(kBlockThreads) act_and_mul_kernel(const __grid_constant__ ActAndMulParams p) {
  const int64_t token = blockIdx.x, i = (int64_t(blockIdx.y) * kBlockThreads + threadIdx.x) * Vec<T>::kSize;
  const int64_t num = p.hidden - i;

  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride + i;
  const Vec<T> gate = load_vec<kAligned>(x, num), up = load_vec<kAligned>(x + p.hidden, num);
  float product[Vec<T>::kSize];
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k)
    product[k] = activate(kActivation, sizeof(T) == 2, to_float(gate.at[k])) * to_float(up.at[k]);
  if (p.quantised.q != nullptr) return store_quantised(p.quantised, token, p.hidden, i, product);
  Vec<T> out;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) out.at[k] = from_float<T>(product[k]);
  store_vec<kAligned>(static_cast<T*>(p.out) + token * p.out_row_stride + i, out, num);
}

template <class T, bool kAligned>
void launch_rows(const ActAndMulParams& p, Stream stream) {
  const dim3 grid(unsigned(p.num_tokens), unsigned(ceil_div(p.hidden, int64_t(kBlockThreads) * Vec<T>::kSize)));
  const LaunchConfig config{.grid = grid, .block = kBlockThreads, .stream = stream};
  if (p.activation == Activation::kSilu) launch(act_and_mul_kernel<T, kAligned, Activation::kSilu>, config, p);
  else launch(act_and_mul_kernel<T, kAligned, Activation::kGeluTanh>, config, p);
}

}  // namespace

void act_and_mul(const ActAndMulParams& p, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned =
        rows_aligned(p.x, sizeof(T), p.x_row_stride, p.hidden) && rows_aligned(p.out, sizeof(T), p.out_row_stride);
    aligned ? launch_rows<T, true>(p, stream) : launch_rows<T, false>(p, stream);
  });
}

}  // namespace tilestream::cuda
