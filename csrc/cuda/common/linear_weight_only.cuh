// Rows of bfloat16 or float16 times group-quantised weights (W4A16, W8A16), for any M: GPTQ's and AWQ's own arithmetic, as
// Marlin has it (Frantar et al. 2024). For few rows, where the weights' bytes are what costs.
//
// As linear_rows.cuh: the weight's columns are the rows of mma.m16n8k16, a block of 4 warps has 128 columns of y, a warp a
// panel of 32, and 8 or 64 rows; K is divided among blocks by N and K alone, so a row's bits do not depend on M. Integers
// become 16-bit floats, in which they are exact, by one prmt for two and a subtraction; the scales join in float32, once for
// 32 k, and zeros meet the sums of x, which one more mma finds (its weights are ones).
// Bound by reading the weights at 8 rows: 32 columns x 32 k are 512 bytes of codes and some 100 instructions of a warp,
// 25 cycles of an SM, in which its share of an H200's 4.8 TB/s brings 520 bytes (an estimate).
// A block keeps 3 steps of 64 k under way: 13 KB of 4-bit codes; two blocks an SM.
#pragma once

#include <stdexcept>

#include "cuda/common/kv_values.cuh"
#include "cuda/common/linear_int8.cuh"
#include "cuda/common/linear_rows.cuh"

namespace tilestream::cuda {

constexpr int kStepParts = kStepK / kGroupK;

template <class T, bool kFourBit, int kTiles>
struct WeightOnlyStorage {
  static constexpr int kCodeChunks = (kFourBit ? 512 : 1024) / 16, kScaleChunks = 2 * kPanelColumns / 16;
  struct Part {
    uint4 codes[kCodeChunks];
    uint4 scale[kScaleChunks], zero[kScaleChunks];  // of the part's group
  };
  struct alignas(32) Row { T x[kStepK + 16]; };  // the rest puts 4 rows of a fragment into different banks
  struct Stage {
    Part weight[kRowsWarps][kStepParts];
    Row rows[8 * kTiles];
  };
  static constexpr int kStages = 4;
  Stage ring[kStages];
};

// Starts the copies of one step; what lies past m or k is zeros, panels past the last are the last again.
template <class T, bool kFourBit, int kTiles>
__device__ __forceinline__ void fetch_step(const LinearParams& p, typename WeightOnlyStorage<T, kFourBit, kTiles>::Stage& stage,
                                           int first_panel, int64_t first_row, int step) {
  using Storage = WeightOnlyStorage<T, kFourBit, kTiles>;
  constexpr int kPartChunks = Storage::kCodeChunks + 2 * Storage::kScaleChunks;
  const int last_panel = int(ceil_div(p.n, kPanelColumns)) - 1, num_parts = int(p.k / kGroupK);
  const int group_parts_log2 = group_k(p.format) == kGroupK ? 0 : 2, group_parts = 1 << group_parts_log2;
  const int scale_chunks = (has_zero(p.format) ? 2 : 1) * Storage::kScaleChunks;
  const int group_chunks = group_parts * Storage::kCodeChunks + scale_chunks;
  const int64_t panel_chunks = panel_bytes(p.format, p.k) / 16;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRowsWarps * kStepParts * kPartChunks; i += kRowsThreads) {
    const int panel = i / (kStepParts * kPartChunks), j = i / kPartChunks % kStepParts, chunk = i % kPartChunks;
    const int part = step * kStepParts + j, group = part >> group_parts_log2, in_group = part & (group_parts - 1);
    const int parts = min(group_parts, num_parts - (group << group_parts_log2));
    const auto* const from = static_cast<const uint4*>(p.weight) + min(first_panel + panel, last_panel) * panel_chunks +
                             int64_t(group) * group_chunks;
    auto& to = stage.weight[panel][j];
    const bool inside = part < num_parts;
    if (chunk < Storage::kCodeChunks) {
      ptx::cp_async<16>(&to.codes[swizzled(chunk)], inside ? from + in_group * Storage::kCodeChunks + chunk : from,
                        inside ? 16 : 0);
    } else {
      const int at = chunk - Storage::kCodeChunks;
      if (at >= scale_chunks) continue;
      ptx::cp_async<16>(&to.scale[at], inside ? from + parts * Storage::kCodeChunks + at : from, inside ? 16 : 0);
    }
  }
  const auto* const x = static_cast<const T*>(p.x);
#pragma unroll
  for (int i = threadIdx.x; i < 8 * kTiles * kStepChunks; i += kRowsThreads) {
    const int row = i / kStepChunks, at = i % kStepChunks * 8;
    const int64_t k = int64_t(step) * kStepK + at;
    const bool inside = first_row + row < p.m && k < p.k;
    ptx::cp_async<16>(stage.rows[row].x + at, inside ? x + (first_row + row) * p.x_row_stride + k : x, inside ? 16 : 0);
  }
}

// Bytes 2i and 2i + 1 of a word of codes, less `offset`, as two T.
template <class T, bool kFourBit>
__device__ __forceinline__ unsigned code_pair(unsigned codes, int i, float offset) {
  if constexpr (std::is_same_v<T, __half>) {  // in the mantissa of 1024
    const unsigned biased = ptx::prmt(codes, 0x64646464u, i == 0 ? 0x4140u : 0x4342u);
    const __half2 pair = __hsub2(reinterpret_cast<const __half2&>(biased), __floats2half2_rn(1024.0f + offset, 1024.0f + offset));
    return reinterpret_cast<const unsigned&>(pair);
  } else if constexpr (kFourBit) {  // in that of 128, which has 7 bits
    const unsigned biased = ptx::prmt(codes, 0x43434343u, i == 0 ? 0x4140u : 0x4342u);
    const __nv_bfloat162 pair =
        __hsub2(reinterpret_cast<const __nv_bfloat162&>(biased), __floats2bfloat162_rn(128.0f + offset, 128.0f + offset));
    return reinterpret_cast<const unsigned&>(pair);
  } else {
    const auto value = [&](int byte) { return float(codes >> 8 * byte & 255u) - offset; };
    return pack<T>(value(2 * i), value(2 * i + 1));
  }
}

// total += 32 k of 8 kTiles rows.
template <class T, bool kFourBit, int kTiles>
__device__ __forceinline__ void multiply_part(const LinearParams& p,
                                              const typename WeightOnlyStorage<T, kFourBit, kTiles>::Stage& stage, int j,
                                              Fragments<kTiles>& total) {
  constexpr PackedFormat kFormat = kFourBit ? PackedFormat::kU4G32 : PackedFormat::kU8G32;  // whose codes lie as all others'
  constexpr unsigned kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const auto& part = stage.weight[threadIdx.x / kWarpSize][j];
  const bool zeros = has_zero(p.format);
  const float offset = zeros ? 0.0f : float(GroupLayout<kFormat>::kOffset);
  unsigned codes[4][2], weight[2][2][4];  // [16 k][h]
  const int chunk = g / 4 * (GroupLayout<kFormat>::kHalfBytes / 16) + t * 4 + g % 4;
  const uint4 low = part.codes[swizzled(chunk)], high = kFourBit ? low : part.codes[swizzled(chunk + 16)];
  unpack<kFormat, false>(low.x, high.x, codes[0]);
  unpack<kFormat, false>(low.y, high.y, codes[1]);
  unpack<kFormat, false>(low.z, high.z, codes[2]);
  unpack<kFormat, false>(low.w, high.w, codes[3]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int step = i / 4, h = i / 2 % 2, column = 2 * h + i % 2;
    weight[step][h][i % 2] = code_pair<T, kFourBit>(codes[column][step], 0, offset);
    weight[step][h][2 + i % 2] = code_pair<T, kFourBit>(codes[column][step], 1, offset);
  }
  const FourHalfs scale = reinterpret_cast<const FourHalfs*>(part.scale)[g],
                  zero = reinterpret_cast<const FourHalfs*>(part.zero)[g];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const auto* const x = reinterpret_cast<const uint2*>(stage.rows[8 * tile + g].x + kGroupK * j);
    const uint2 first = x[t], second = x[4 + t];
    float sum[4] = {};
    if (zeros) {
      mma_m16n8k16<T>(sum, {kOnes, kOnes, kOnes, kOnes}, {first.x, first.y});
      mma_m16n8k16<T>(sum, {kOnes, kOnes, kOnes, kOnes}, {second.x, second.y});
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float acc[4] = {};
      mma_m16n8k16<T>(acc, weight[0][h], {first.x, first.y});
      mma_m16n8k16<T>(acc, weight[1][h], {second.x, second.y});
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 2 * h + i / 2;
        total[tile][h][i] = fmaf(acc[i], to_float(scale.at[c]), total[tile][h][i]);
        if (zeros) total[tile][h][i] = fmaf(sum[i % 2], to_float(zero.at[c]), total[tile][h][i]);
      }
    }
  }
}

// Blocks: (tiles of rows, tiles of 128 columns, slices of K).
template <class T, bool kFourBit, int kTiles>
__global__ void __launch_bounds__(kRowsThreads, kTiles == 1 ? 4 : 2) weight_only_kernel(const __grid_constant__ LinearParams p) {
  using Storage = WeightOnlyStorage<T, kFourBit, kTiles>;
  constexpr int kStages = Storage::kStages;
  auto& ring = dynamic_smem<Storage>().ring;
  const int64_t first_row = int64_t(blockIdx.x) * 8 * kTiles;
  const int first_panel = int(blockIdx.y) * kRowsWarps;
  const int num_steps = int(ceil_div(p.k, kStepK)), num_slices = gridDim.z, slice = blockIdx.z;
  const int begin = num_steps * slice / num_slices, end = num_steps * (slice + 1) / num_slices;
  const auto fetch = [&](int stage, int step) {
    if (step < end) fetch_step<T, kFourBit, kTiles>(p, ring[stage], first_panel, first_row, step);
    ptx::cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i, begin + i);
  Fragments<kTiles> total = {};
  int at = 0;
  for (int step = begin; step < end; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the step is here, and everybody has left the stage that is filled next
    fetch((at + kStages - 1) % kStages, step + kStages - 1);
#pragma unroll
    for (int j = 0; j < kStepParts; ++j) multiply_part<T, kFourBit, kTiles>(p, ring[at], j, total);
    at = (at + 1) % kStages;
  }
  ptx::cp_async_wait_all();
  const int64_t panel = first_panel + threadIdx.x / kWarpSize;
  const int own_slice = num_slices > 1 ? slice : kAllSlices;
  if (panel * kPanelColumns < p.n) store_fragments<kTiles>(p, first_row, panel, total, own_slice);
}

template <class T, bool kFourBit, int kTiles>
void launch_weight_only_tiles(const LinearParams& p, Stream stream) {
  launch_tiles(weight_only_kernel<T, kFourBit, kTiles>, 8 * kTiles, kRowsThreads, sizeof(WeightOnlyStorage<T, kFourBit, kTiles>),
               p, stream);
}

// Instantiations: 2 element types x 4 or 8 bits x tiles of 8 and 64 rows; groups and zeros are found at run time.
inline void launch_weight_only(const LinearParams& p, Stream stream) {
  if (p.dtype == DType::kFloat32) throw std::invalid_argument("x is float32; on a GPU act_bits = 16 takes float16 or bfloat16");
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0 || (p.m > 1 && p.x_row_stride % 8 != 0)) {
    throw std::invalid_argument("x has rows that start between multiples of 16 bytes; on a GPU act_bits = 16 needs such starts");
  }
  const auto launch_bits = [&](auto element, auto four_bit) {
    using T = decltype(element);
    constexpr bool kFourBit = decltype(four_bit)::value;
    if (p.m <= 8) launch_weight_only_tiles<T, kFourBit, 1>(p, stream);
    else launch_weight_only_tiles<T, kFourBit, 8>(p, stream);
  };
  const auto launch_type = [&](auto element) {
    is_four_bit(p.format) ? launch_bits(element, std::true_type{}) : launch_bits(element, std::false_type{});
  };
  p.dtype == DType::kFloat16 ? launch_type(__half{}) : launch_type(__nv_bfloat16{});
}

}  // namespace tilestream::cuda
