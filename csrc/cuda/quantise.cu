// Rows of activations to integers, for linears whose input no other op has quantised (an attention's output); rows that are
// turned by Hadamard matrices first, or only that.
//
// A thread takes two vectors of 16 bytes, a block of 256 threads a stretch of one row. Memory-bound: with 6
// blocks an SM has 48 KB under way, where an H200's 4.8 TB/s, two thirds of them reads, with a latency of 1 us
// (an estimate) ask for 24 KB. No shared memory.
#include "cuda/common/hadamard.cuh"
#include "cuda/common/quantise.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kThreadVecs = 2;

template <class T>
constexpr int64_t kBlockElements = int64_t(kBlockThreads) * kThreadVecs * Vec<T>::kSize;

// Blocks: (rows, stretches of a row).
template <class T, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads) quantise_kernel(const __grid_constant__ QuantiseParams p) {
  constexpr int kSize = Vec<T>::kSize, kStep = kBlockThreads * kSize;
  const int64_t row = blockIdx.x, first = blockIdx.y * kBlockElements<T> + threadIdx.x * kSize;
  const T* const x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  Vec<T> vecs[kThreadVecs];
#pragma unroll
  for (int j = 0; j < kThreadVecs; ++j)
    vecs[j] = load_vec<kAligned>(x + first + j * kStep, p.k - first - j * kStep);
#pragma unroll
  for (int j = 0; j < kThreadVecs; ++j) {
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(vecs[j].at[i]);
    if (p.hadamard) hadamard_span(values);
    if (p.y == nullptr) {
      store_quantised(p.out, row, p.k, first + j * kStep, values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) vecs[j].at[i] = from_float<T>(values[i]);
    store_vec<kAligned>(static_cast<T*>(p.y) + row * p.y_row_stride + first + j * kStep, vecs[j], p.k - first - j * kStep);
  }
}

template <class T, bool kAligned>
void launch_rows(const QuantiseParams& p, Stream stream) {
  const dim3 grid(unsigned(p.rows), unsigned(ceil_div(p.k, kBlockElements<T>)));
  launch(quantise_kernel<T, kAligned>, {.grid = grid, .block = kBlockThreads, .stream = stream}, p);
}

}  // namespace

void quantise(const QuantiseParams& p, Stream stream) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned(p.x, sizeof(T), p.x_row_stride) && rows_aligned(p.y, sizeof(T), p.y_row_stride);
    aligned ? launch_rows<T, true>(p, stream) : launch_rows<T, false>(p, stream);
  });
}

}  // namespace tilestream::cuda
