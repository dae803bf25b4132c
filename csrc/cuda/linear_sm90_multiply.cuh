// The Hopper linears' other warpgroups: products of groups of 128 k, their scales, and the results.
//
// wgmma's rows are columns of y: row g + 8 i of warp w is column 2 g + i of the 16 that the warp has, so that a lane
// reads both in one instruction, as the packed format has them, and stores them side by side.
#pragma once

#include "cuda/linear_sm90_config.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace tilestream::cuda {

using GroupFragments = unsigned[4][4];  // of the weight: [32 k][register of wgmma]

// The codes of 16 columns. Symmetric 4-bit ones become int8 of 16 times the value in 1.5 instructions for four
// codes, as their high nibbles are already in place; those with zeros stay as they are.
template <class Layout>
__device__ __forceinline__ void load_fragments(const unsigned char* half, GroupFragments& a) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const auto* const codes = reinterpret_cast<const uint2*>(half + part * Layout::kCodeBytes + t * 64 + g * 8);
    const uint2 v = *codes;
    if constexpr (!Layout::kFourBit) {
      constexpr unsigned kOffset = 0x80808080u;
      const uint2 later = codes[4 * 64 / sizeof(uint2)];
      a[part][0] = v.x ^ kOffset, a[part][1] = v.y ^ kOffset;
      a[part][2] = later.x ^ kOffset, a[part][3] = later.y ^ kOffset;
    } else if constexpr (Layout::kHasZero) {
      constexpr unsigned kLow = 0x0f0f0f0fu;
      a[part][0] = v.x & kLow, a[part][1] = v.y & kLow;
      a[part][2] = v.x >> 4 & kLow, a[part][3] = v.y >> 4 & kLow;
    } else {
      constexpr unsigned kHigh = 0xf0f0f0f0u, kOffset = 0x80808080u;
      a[part][0] = (v.x << 4 & kHigh) ^ kOffset, a[part][1] = (v.y << 4 & kHigh) ^ kOffset;
      a[part][2] = (v.x & kHigh) ^ kOffset, a[part][3] = (v.y & kHigh) ^ kOffset;
    }
  }
}

// A group's integer sums stay below 2^22 in size: 128 products of at most 128 * 128. Added to the bits of 1.5 * 2^23
// they are the low bits of a float, times a float16 scale exactly so: one addition and one fma give sum * scale.
constexpr int kSumMagicBits = 0x4b400000;
constexpr float kSumMagic = 12582912.0f;

// Scales of a lane's two columns of a group, with what takes the magic out again; zeros.
template <class Layout>
struct ColumnScales {
  float scale[2], magic[2], zero[2];

  __device__ __forceinline__ ColumnScales(const unsigned char* panel, int half, int parts, bool int4) {
    const int at = parts * Layout::kCodeBytes + half * kPanelColumns + threadIdx.x % kWarpSize / 4 * 4;
    const auto load = [&](int from) { return __half22float2(*reinterpret_cast<const __half2*>(panel + from)); };
    const float unit = (Layout::kFourBit && !Layout::kHasZero ? 0.0625f : 1.0f) * (int4 ? 0.0625f : 1.0f);
    const float2 two = load(at);
    scale[0] = two.x * unit, scale[1] = two.y * unit;
    magic[0] = -kSumMagic * scale[0], magic[1] = -kSumMagic * scale[1];
    if constexpr (Layout::kHasZero) {
      const float2 zeros = load(at + Layout::kScaleBytes);
      zero[0] = zeros.x, zero[1] = zeros.y;
    }
  }
};

template <class C>
class Multiplier {
  using Layout = typename C::Layout;
  static constexpr int kRegisters = C::kChunk / 2;
  using Dots = int[kRegisters];

 public:
  __device__ __forceinline__ Multiplier(const LinearParams& p, const LinearWork<C>& work, LinearSm90Storage<C>& s, int warpgroup)
      : p_(p), work_(work), s_(s), first_half_((4 * warpgroup + int(threadIdx.x) % 128 / kWarpSize) * C::kHalves) {}

  __device__ __forceinline__ void run() {
    for (int tile = work_.first_tile(); tile < work_.num_tiles; tile += work_.tile_step()) {
      for (int slice = work_.first_slice(); slice < work_.end_slice(); ++slice) {
#pragma unroll
        for (int i = 0; i < C::kHalves * C::kTokens / 2; ++i) total_[i / (C::kTokens / 2)][i % (C::kTokens / 2)] = 0.0f;
        sum_slice(work_.slice_begin(slice), work_.slice_begin(slice + 1));
        if constexpr (C::kWide) add_slices(slice);
      }
      if (work_.blocks_per_tile() > 1) {
        put_partial(tile);
      } else {
        add_bias(tile);
        if (is_gated(p_)) join_gates();
        else if (p_.residual != nullptr) with_type([&](auto type) { add_residual<decltype(type)>(tile); });
        with_type([&](auto type) { store<decltype(type)>(tile); });
      }
    }
  }

 private:
  // opaque: nothing that is made of it for the results is kept in registers through the products.
  __device__ __forceinline__ static int lane() { return ptx::opaque(threadIdx.x) % kWarpSize; }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&s_.empty[stage]);
  }

  __device__ __forceinline__ void load(int m, int stage, GroupFragments& a) const {
    const int half = first_half_ + m;
    load_fragments<Layout>(s_.weight[stage][half / 2] + half % 2 * Layout::kHalfBytes, a);
  }

  // dots = 64 columns by the tokens of a chunk.
  __device__ __forceinline__ void start(Dots& dots, GroupFragments& a, int chunk, int stage) const {
    const unsigned char* const tokens = s_.x[stage] + chunk * C::kChunk * kRowBytes8;
    const uint64_t x = ptx::wgmma_descriptor(tokens, ptx::Swizzle::k128, 8 * kRowBytes8);
    ptx::wgmma_fence(dots, a);
#pragma unroll
    for (int part = 0; part < 4; ++part) ptx::wgmma_m64k32_s8(dots, a[part], ptx::wgmma_advance(x, part * 32), part > 0);
    ptx::wgmma_commit_group();
  }

  using Columns = ColumnScales<Layout>;
  __device__ __forceinline__ Columns column_scales(int m, int stage, int group) const {
    const int half = first_half_ + m;
    return {s_.weight[stage][half / 2], half % 2, Layout::parts(p_.k, group), group < work_.num_groups4};
  }

  // Scales of a lane's tokens of a chunk, read while its product is under way.
  struct TokenScales {
    float2 at[C::kChunk / 8];

    __device__ __forceinline__ TokenScales(const float* scales) {
#pragma unroll
      for (int j = 0; j < C::kChunk / 8; ++j) at[j] = *reinterpret_cast<const float2*>(scales + 8 * j + threadIdx.x % 4 * 2);
    }
  };

  // total_ += dots with their scales.
  __device__ __forceinline__ void add(const Dots& dots, const Columns& w, const TokenScales& x, int m, int chunk, int stage) {
#pragma unroll
    for (int j = 0; j < C::kChunk / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x_scale = e == 0 ? x.at[j].x : x.at[j].y;
        [[maybe_unused]] float x_sum;
        if constexpr (Layout::kHasZero) {
          const int token = chunk * C::kChunk + 8 * j + int(threadIdx.x) % 4 * 2 + e;
          const int4 sums = *reinterpret_cast<const int4*>(s_.sum[stage][token]);
          x_sum = float(sums.x + sums.y + sums.z + sums.w) * x_scale;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& total = total_[m][chunk * kRegisters + 4 * j + 2 * i + e];
          const float sum = __int_as_float(dots[4 * j + 2 * i + e] + kSumMagicBits);
          total = fmaf(fmaf(sum, w.scale[i], w.magic[i]), x_scale, total);
          if constexpr (Layout::kHasZero) total = fmaf(w.zero[i], x_sum, total);
        }
      }
    }
  }

  // Waits for the next stage, whose number this is.
  __device__ __forceinline__ int next_stage() {
    const int stage = ring_.stage;
    ptx::mbarrier_wait_parity(&s_.full[stage], ring_.parity);
    ring_.advance();
    return stage;
  }

  // total_ += groups [begin, end).
  __device__ __forceinline__ void sum_slice(int begin, int end) {
    int group = begin;
    if constexpr (C::kTwoGroups) {
      for (; group + 1 < end; group += 2) add_two_groups(group);
    }
    for (; group < end; ++group) add_group(group);
  }

  __device__ __forceinline__ void add_group(int group) {
    const int stage = next_stage();
#pragma unroll
    for (int m = 0; m < C::kHalves; ++m) {
      GroupFragments a;
      load(m, stage, a);
      const Columns w = column_scales(m, stage, group);
#pragma unroll
      for (int chunk = 0; chunk < C::kChunks; ++chunk) {
        Dots dots;
        start(dots, a, chunk, stage);
        const TokenScales x(s_.scale[stage] + chunk * C::kChunk);
        ptx::wgmma_wait_group<0>(dots, a);
        add(dots, w, x, m, chunk, stage);
      }
    }
    release(stage);
  }

  // The second group's product is under way while the first is added.
  __device__ __forceinline__ void add_two_groups(int group) {
    Dots first, second;
    GroupFragments a, b;
    const int stage = next_stage();
    load(0, stage, a);
    start(first, a, 0, stage);
    const int later_stage = next_stage();
    load(0, later_stage, b);
    start(second, b, 0, later_stage);
    const Columns w = column_scales(0, stage, group), later_w = column_scales(0, later_stage, group + 1);
    const TokenScales x(s_.scale[stage]), later_x(s_.scale[later_stage]);
    ptx::wgmma_wait_group<1>(first, a);
    add(first, w, x, 0, 0, stage);
    release(stage);
    ptx::wgmma_wait_group<0>(second, b);
    add(second, later_w, later_x, 0, 0, later_stage);
    release(later_stage);
  }

  // total_ = the sum of the slices up to this one. Between them it waits in the workspace, where each thread has its
  // own place.
  __device__ __forceinline__ void add_slices(int slice) {
    constexpr int kThreads = C::kWarpgroups * 128, kVecs = C::kHalves * C::kTokens / 8;
    auto* const mine =
        static_cast<float4*>(p_.workspace) + int64_t(blockIdx.x) * kVecs * kThreads + ptx::opaque(threadIdx.x) - 128;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float* const four = &total_[i / (C::kTokens / 8)][i % (C::kTokens / 8) * 4];
      if (slice > 0) {
        const float4 before = mine[i * kThreads];
        four[0] += before.x, four[1] += before.y, four[2] += before.z, four[3] += before.w;
      }
      if (slice + 1 < work_.num_slices) mine[i * kThreads] = make_float4(four[0], four[1], four[2], four[3]);
    }
  }

  __device__ __forceinline__ int column(int tile, int m) const {
    return work_.first_column(tile) + (first_half_ + m) * 16 + lane() / 4 * 2;
  }

  __device__ __forceinline__ void add_bias(int tile) {
    if (p_.bias == nullptr) return;
#pragma unroll
    for (int m = 0; m < C::kHalves; ++m) {
      const int n = column(tile, m), last = int(p_.n) - 1;
      const float bias[2] = {bias_of(p_, min(n, last)), bias_of(p_, min(n + 1, last))};
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) total_[m][i] += bias[i / 2 % 2];
    }
  }

  // Of each pair of neighbours its first becomes their output.
  __device__ __forceinline__ void join_gates() {
#pragma unroll
    for (int m = 0; m < C::kHalves; ++m) {
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) {
        if (i / 2 % 2 == 0) total_[m][i] = gated(p_, total_[m][i], total_[m][i + 2]);
      }
    }
  }

  // Calls run(place, column, total, total of the next column) for a lane's pairs of neighbours. Row 0 is at `to`, where the
  // first of a pair has the place of column / columns_per_place.
  template <class T, class Run>
  __device__ __forceinline__ void for_each_pair(int tile, T* to, int64_t row_stride, int columns_per_place, Run run) {
    const int first_row = work_.first_row(tile) + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < C::kHalves; ++m) {
      const int n = column(tile, m);
      if (n >= p_.n) continue;
      T* place = to + first_row * row_stride + (columns_per_place == 1 ? n : n / 2);
#pragma unroll
      for (int i = 0; i < C::kTokens / 4; ++i) {
        const int at = i / 2 * 4 + i % 2;
        if (first_row + i / 2 * 8 + i % 2 < p_.m) run(place, n, total_[m][at], total_[m][at + 2]);
        place += i % 2 == 0 ? row_stride : 7 * row_stride;
      }
    }
  }

  __device__ __forceinline__ void put_partial(int tile) {
    float* const sums = slice_sum(p_, work_.first_slice(), 0, 0);
    for_each_pair(tile, sums, round_up(p_.n, kPanelColumns), 1, [](float* place, int, float one, float two) {
      *reinterpret_cast<float2*>(place) = make_float2(one, two);
    });
  }

  template <class Run>
  __device__ __forceinline__ void with_type(Run run) const {
    if (p_.dtype == DType::kBFloat16) run(__nv_bfloat16{});
    else if (p_.dtype == DType::kFloat16) run(__half{});
    else run(float{});
  }

  template <class T>
  __device__ __forceinline__ void add_residual(int tile) {
    const auto* const residual = static_cast<const T*>(p_.residual);
    for_each_pair(tile, residual, p_.residual_row_stride, 1, [&](const T* place, int n, float& one, float& two) {
      one += to_float(place[0]);
      if (n + 1 < p_.n) two += to_float(place[1]);
    });
  }

  // Wide blocks store pairs (sm90_is_wide), but for gated ones.
  template <class T>
  __device__ __forceinline__ void store(int tile) {
    struct alignas(2 * sizeof(T)) Pair { T at[2]; };
    const bool gated_pairs = is_gated(p_);
    for_each_pair(tile, static_cast<T*>(p_.y), p_.y_row_stride, columns_per_output(p_),
                  [&](T* place, int n, float one, float two) {
                    if (gated_pairs) {
                      place[0] = from_float<T>(one);
                      return;
                    }
                    const Pair pair{from_float<T>(one), from_float<T>(two)};
                    if constexpr (C::kWide) {
                      *reinterpret_cast<Pair*>(place) = pair;
                    } else {
                      place[0] = pair.at[0];
                      if (n + 1 < p_.n) place[1] = pair.at[1];
                    }
                  });
  }

  const LinearParams& p_;
  const LinearWork<C>& work_;
  LinearSm90Storage<C>& s_;
  const int first_half_;
  StageRing<C::kStages> ring_;
  float total_[C::kHalves][C::kTokens / 2];
};

}  // namespace tilestream::cuda
