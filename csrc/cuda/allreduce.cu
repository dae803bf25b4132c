// All-reduce over the ranks, residual addition, RMS norm and quantisation in one pass (tilestream/allreduce.h).
//
// At most 16 blocks, so that the other stream keeps nearly all SMs. A block of 512 threads takes 2 of the rank's
// own rows at once, 256 threads each, or 16 of a warp each, as norm.cu does, whose bits a row's norm has. Each
// rank's part of a row comes by peer loads, up to 16 vectors of a thread under way, or summed by the switch
// (multimem); in registers it gets the residual, the norm and maybe the quantisation, and the result goes to every
// rank by stores, or by the switch. What a thread cannot hold (a row beyond 8,192 two-byte elements) it gets
// again. No row is touched by two blocks, so two barriers do (allreduce_barrier.cuh): everyone's x is there;
// everyone's results are.
//
// Bound by the link. Of S = num_tokens * hidden * bytes and W ranks a GPU's link carries, each way,
// 2 S (W - 1) / W by peer accesses and S (W + 1) / W through the switch, against 2 S / W of the residual, read and
// written in its own memory. 1,024 tokens of 8,192 bf16 on 8 H100s (450 GB/s each way): 65 us and 42 us;
// TokenWeave measured 75 us through the switch, as long as the sum alone takes. Under way are 16 blocks * 512
// threads * 64 bytes = 512 KB through the switch (up to 2 MB from peers), where 450 GB/s with a round trip of
// 1.5 us (an estimate) ask for 675 KB. Few tokens cost two barriers and a round trip of loads, 5 us (an
// estimate). 128 bytes of shared memory; at most 128 registers.
#include <type_traits>

#include "cuda/allreduce_barrier.cuh"
#include "cuda/common/quantise.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/multimem.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kBlockThreads = 512;
constexpr int kLongRowThreads = 256;  // norm.cu's, and so is the order of the sum of a row's squares
constexpr int64_t kWarpRowElements = 1024;
constexpr int kHeldVecs = 4;
constexpr int kVecsUnderWay = 16;     // of 4 registers
constexpr int kMulticast = 1;         // as kSources: the switch alone, which also takes the result

struct SharedStorage {
  float partials[2][kBlockThreads / kWarpSize];  // of a row and of the next, which may begin while others read
};

// Sixteen bytes at `offset`: rank s's, or all ranks' as the switch adds them.
template <class T, int kSources>
__device__ __forceinline__ uint4 load_words(const Ranks& ranks, int s, int64_t offset) {
  if constexpr (kSources != kMulticast) {
    return *reinterpret_cast<const uint4*>(ranks.memory[s] + offset);
  } else if constexpr (sizeof(T) == 4) {
    const float4 sum = ptx::multimem_ld_reduce_add_f32(ranks.multicast + offset);
    return reinterpret_cast<const uint4&>(sum);
  } else if constexpr (std::is_same_v<T, __half>) {
    return ptx::multimem_ld_reduce_add_f16x2(ranks.multicast + offset);
  } else {
    return ptx::multimem_ld_reduce_add_bf16x2(ranks.multicast + offset);
  }
}

template <int kSources, class V>
__device__ __forceinline__ void store_everywhere(const Ranks& ranks, int64_t offset, const V& v) {
  if constexpr (kSources == kMulticast) {
    unsigned char* const p = ranks.multicast + offset;
    if constexpr (sizeof(V) == 16) ptx::multimem_st(p, reinterpret_cast<const uint4&>(v));
    else if constexpr (sizeof(V) == 8) ptx::multimem_st_b64(p, reinterpret_cast<const uint2&>(v));
    else ptx::multimem_st_b32(p, reinterpret_cast<const unsigned&>(v));
  } else {
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      if (s < ranks.world_size) *reinterpret_cast<V*>(ranks.memory[s] + offset) = v;
    }
  }
}

// kNum vectors of a row, `step` apart: the sums over the ranks. Zeros past the row's end.
template <class T, int kSources, bool kAligned, int kNum>
__device__ __forceinline__ void add_ranks(const AllReduceRmsNormParams& p, int64_t token, int i, int step,
                                          float (*sums)[Vec<T>::kSize]) {
  const int64_t row = p.x + token * p.hidden * int(sizeof(T));
#pragma unroll
  for (int j = 0; j < kNum; ++j) {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) sums[j][k] = 0.0f;
  }
  if constexpr (kAligned) {
    uint4 words[kNum][kSources];
#pragma unroll
    for (int j = 0; j < kNum; ++j) {
      const int at = i + j * step;
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        words[j][s] = make_uint4(0, 0, 0, 0);
        if (s < p.ranks.world_size && at < p.hidden)
          words[j][s] = load_words<T, kSources>(p.ranks, s, row + at * int(sizeof(T)));
      }
    }
#pragma unroll
    for (int j = 0; j < kNum; ++j) {
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        const auto& part = reinterpret_cast<const Vec<T>&>(words[j][s]);
#pragma unroll
        for (int k = 0; k < Vec<T>::kSize; ++k) sums[j][k] += to_float(part.at[k]);
      }
    }
  } else {
    static_assert(kNum == 1);
#pragma unroll 1
    for (int s = 0; s < p.ranks.world_size; ++s) {
      const auto* const of_rank = reinterpret_cast<const T*>(p.ranks.memory[s] + row);
      const Vec<T> part = load_vec<false>(of_rank + i, int(p.hidden) - i);
#pragma unroll
      for (int k = 0; k < Vec<T>::kSize; ++k) sums[0][k] += to_float(part.at[k]);
    }
  }
}

// The residual's elements from i on, still packed; zeros past the row's end.
template <class T, bool kAligned>
__device__ __forceinline__ uint4 load_residual(const AllReduceRmsNormParams& p, int64_t token, int i) {
  if (p.residual == nullptr || (kAligned && i >= p.hidden)) return make_uint4(0, 0, 0, 0);
  const T* const at = static_cast<const T*>(p.residual) + token * p.residual_row_stride + i;
  const Vec<T> v = load_vec<kAligned>(at, kAligned ? Vec<T>::kSize : int(p.hidden) - i);
  return reinterpret_cast<const uint4&>(v);
}

// Adds the residual, rounded as it is stored, which this also does.
template <class T, bool kAligned>
__device__ __forceinline__ void add_residual(const AllReduceRmsNormParams& p, int64_t token, int i,
                                             const uint4& residual, float (&sum)[Vec<T>::kSize]) {
  if (p.residual == nullptr || (kAligned && i >= p.hidden)) return;
  Vec<T> v = reinterpret_cast<const Vec<T>&>(residual);
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) {
    v.at[k] = from_float<T>(sum[k] + to_float(v.at[k]));
    sum[k] = to_float(v.at[k]);
  }
  T* const at = static_cast<T*>(p.residual) + token * p.residual_row_stride + i;
  store_vec<kAligned>(at, v, kAligned ? Vec<T>::kSize : int(p.hidden) - i);
}

// kNum vectors of a row, `step` apart: what its norm is of. Their squares are added to `squares`.
template <class T, int kSources, bool kAligned, int kNum>
__device__ __forceinline__ void load_sums(const AllReduceRmsNormParams& p, int64_t token, int i, int step,
                                          float (*sums)[Vec<T>::kSize], float& squares) {
  uint4 residual[kNum];
#pragma unroll
  for (int j = 0; j < kNum; ++j) residual[j] = load_residual<T, kAligned>(p, token, i + j * step);
  add_ranks<T, kSources, kAligned, kNum>(p, token, i, step, sums);
#pragma unroll
  for (int j = 0; j < kNum; ++j) {
    float(&sum)[Vec<T>::kSize] = sums[j];
    add_residual<T, kAligned>(p, token, i + j * step, residual[j], sum);
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) squares = fmaf(sum[k], sum[k], squares);
  }
}

// The sum over the threads of a row, of whom there is a warp or kLongRowThreads; block_sum's order.
__device__ __forceinline__ float row_sum(float v, unsigned row_threads, float* partials) {
  v = warp_sum(v);
  if (row_threads == kWarpSize) return v;
  const unsigned row = threadIdx.x / kLongRowThreads, lane = threadIdx.x % kWarpSize;
  constexpr unsigned kWarps = kLongRowThreads / kWarpSize;
  if (lane == 0) partials[threadIdx.x / kWarpSize] = v;
  ptx::bar_sync(1 + int(row), kLongRowThreads);
  return warp_sum(lane < kWarps ? partials[row * kWarps + lane] : 0.0f);
}

// Scaled elements from i on, to every rank. The whole warp takes part.
template <class T, int kSources, bool kAligned>
__device__ __forceinline__ void store_scaled(const AllReduceRmsNormParams& p, int64_t token, int i,
                                             const float (&values)[Vec<T>::kSize], float inverse) {
  constexpr int kSize = Vec<T>::kSize;
  const int num = int(p.hidden) - i;
  float scaled[kSize];
#pragma unroll
  for (int j = 0; j < kSize; j += Vec<float>::kSize) {
    Vec<float> weight;
    if (p.weight != nullptr) weight = load_vec<kAligned>(p.weight + i + j, num - j);  // 0 past the end
#pragma unroll
    for (int k = 0; k < Vec<float>::kSize; ++k)
      scaled[j + k] = p.weight != nullptr ? values[j + k] * inverse * weight.at[k] : values[j + k];
  }
  if (p.q >= 0) {
    unsigned char* const mine = p.ranks.memory[p.ranks.rank];
    const QuantisedRows rows{reinterpret_cast<int8_t*>(mine + p.q), reinterpret_cast<float*>(mine + p.scale),
                             reinterpret_cast<int32_t*>(mine + p.sum), p.k4};
    return store_quantised(rows, token, p.hidden, i, scaled, [&](auto* at, auto v) {
      store_everywhere<kSources>(p.ranks, reinterpret_cast<unsigned char*>(at) - mine, v);
    });
  }
  Vec<T> rounded;
#pragma unroll
  for (int k = 0; k < kSize; ++k) rounded.at[k] = from_float<T>(scaled[k]);
  const int64_t offset = p.x + (token * p.hidden + i) * int(sizeof(T));
  if constexpr (kAligned) {
    if (num > 0) store_everywhere<kSources>(p.ranks, offset, rounded);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (k < num) store_everywhere<kSources>(p.ranks, offset + k * int(sizeof(T)), rounded.at[k]);
    }
  }
}

// kSources: kMulticast, or the most ranks whose memory it reads.
template <class T, int kSources, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, 1)
    allreduce_rmsnorm_kernel(const __grid_constant__ AllReduceRmsNormParams p) {
  if constexpr (kSources != kMulticast || ptx::kHasMultimem) {
    constexpr bool kAlias = kSources == kMulticast;
    constexpr int kMostAtOnce = kAligned ? kVecsUnderWay / kSources : 1;
    constexpr int kAtOnce = kMostAtOnce < kHeldVecs ? kMostAtOnce : kHeldVecs;
    constexpr int kSize = Vec<T>::kSize;
    const unsigned count = signals_of(p.ranks, p.ranks.rank).past[blockIdx.x];
    if (!meet<kAlias>(p.ranks, count + 1)) return;

    const unsigned row_threads = p.hidden <= kWarpRowElements ? kWarpSize : kLongRowThreads;
    const unsigned rows_per_block = blockDim.x / row_threads;
    const int step = int(row_threads) * kSize, first = int(threadIdx.x % row_threads) * kSize;
    // Lanes past the row's end stay with their warp, and hold zeros.
    const int end = int(p.hidden) + int(threadIdx.x % kWarpSize) * kSize;
    const TokenRange own = tokens_of(p.num_tokens, p.ranks.rank, p.ranks.world_size);
    int parity = 0;
    const int first_token = int(own.begin) + int(blockIdx.x * rows_per_block + threadIdx.x / row_threads);
    for (int token = first_token; token < int(own.end); token += int(gridDim.x * rows_per_block), parity ^= 1) {
      float held[kHeldVecs][kSize], later[1][kSize];
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < kHeldVecs; j += kAtOnce) {
        if (first + j * step >= end) continue;
        load_sums<T, kSources, kAligned, kAtOnce>(p, token, first + j * step, step, held + j, squares);
      }
      for (int i = first + kHeldVecs * step; i < end; i += step)
        load_sums<T, kSources, kAligned, 1>(p, token, i, step, later, squares);

      float inverse = 1.0f;
      if (p.weight != nullptr) {
        const float total = row_sum(squares, row_threads, dynamic_smem<SharedStorage>().partials[parity]);
        inverse = rsqrtf(total / float(p.hidden) + p.eps);
      }

      // `first`, in a way that hides it: what follows from it would be kept in registers from row to row.
      const int begin = __shfl_sync(kFullMask, first, threadIdx.x % kWarpSize);
#pragma unroll
      for (int j = 0; j < kHeldVecs; ++j) {
        const int i = begin + j * step;
        if (i < end) store_scaled<T, kSources, kAligned>(p, token, i, held[j], inverse);
      }
      for (int i = first + kHeldVecs * step; i < end; i += step) {
        if (p.residual != nullptr) {
          const uint4 words = load_residual<T, kAligned>(p, token, i);
          const auto& stored = reinterpret_cast<const Vec<T>&>(words);
#pragma unroll
          for (int k = 0; k < kSize; ++k) later[0][k] = to_float(stored.at[k]);
        } else {
          add_ranks<T, kSources, kAligned, 1>(p, token, i, step, later);
        }
        store_scaled<T, kSources, kAligned>(p, token, i, later[0], inverse);
      }
    }

    if (!meet<kAlias>(p.ranks, count + 2)) return;
    if (threadIdx.x == 0) signals_of(p.ranks, p.ranks.rank).past[blockIdx.x] = count + 2;
  }
}

// The grid is the same on every rank, whatever the rank's own rows.
template <class T, int kSources, bool kAligned>
void launch_rows(const AllReduceRmsNormParams& p, Stream stream) {
  const int64_t rows = ceil_div(p.num_tokens, p.ranks.world_size);
  const int64_t row_threads = p.hidden <= kWarpRowElements ? kWarpSize : kLongRowThreads;
  const int64_t grid = rows < kMaxRankBlocks ? rows : kMaxRankBlocks, threads = ceil_div(rows, grid) * row_threads;
  const int64_t block = threads < kBlockThreads ? threads : kBlockThreads;
  launch(allreduce_rmsnorm_kernel<T, kSources, kAligned>,
         {.grid = unsigned(grid), .block = unsigned(block), .smem_bytes = sizeof(SharedStorage), .stream = stream}, p);
}

}  // namespace

void allreduce_rmsnorm(const AllReduceRmsNormParams& p, Stream stream) {
  if (p.num_tokens == 0) return;
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned = rows_aligned(p.ranks.memory[p.ranks.rank] + p.x, sizeof(T), p.hidden) &&
                         rows_aligned(p.residual, sizeof(T), p.residual_row_stride) &&
                         rows_aligned(p.weight, sizeof(float));
    if (!aligned) return launch_rows<T, kMaxRanks, false>(p, stream);
    if (p.ranks.multicast != nullptr) return launch_rows<T, kMulticast, true>(p, stream);
    if (p.ranks.world_size <= 2) return launch_rows<T, 2, true>(p, stream);
    if (p.ranks.world_size <= 4) return launch_rows<T, 4, true>(p, stream);
    launch_rows<T, kMaxRanks, true>(p, stream);
  });
}

}  // namespace tilestream::cuda
