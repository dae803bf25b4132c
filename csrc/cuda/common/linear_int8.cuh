// Integer activations times group-quantised weights, for any M: one warp, one span of 128 k, one panel.
// linear_int8_kernels.cuh deals these out.
//
// The weight's columns are the rows of mma and the activations' rows its 8 columns (the flat GEMM of
// FlashDecoding++, Hong et al. 2023), so that M is padded to 8 only. It serves M = 1 too: a warp unpacks 16
// bytes of weights in a dozen instructions and multiplies them by two mma, while dot products (dp4a) would
// take 8 instructions a row.
//
// Lane (g, t) = (lane / 4, lane % 4) takes k 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3 of every 32, of columns
// 4g .. 4g + 3: 16 bytes of 4-bit codes, or twice 16 of 8-bit ones. INT8 spans meet codes of 8 bits
// (m16n8k32). INT4 spans, which only 4-bit weights in groups of 128 meet, have their nibbles in the order of
// the weight's: one word of each, as it is, is half of an operand of m16n8k64.
//
// A format without zeros is multiplied as signed integers, so that the activations' sums are not needed. So
// are nibbles with zeros, which are moved by 8 steps: ptxas copies the accumulators of u4 x s4, a quarter
// more instructions in all.
//
// Inner products of a group are exact in int32; then, in order,
//     acc = acc + float(int32) * weight_scale  (+ weight_zero * float(x_sum))
// and at a span's end total = total + acc * x_scale.
#pragma once

#include "cuda/common/linear_tile.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

constexpr int kSpanParts = kScaleK / kGroupK;  // of 32 k

template <PackedFormat F>
constexpr int kSpanGroups = kScaleK / group_k(F);

template <PackedFormat F>
constexpr int kSpanChunks = kSpanGroups<F> * GroupLayout<F>::kBytes / 16;  // of 16 bytes, of one panel

// Whose rows may have INT4 spans.
TILESTREAM_HOST_DEVICE constexpr bool takes_int4(PackedFormat f) {
  return is_four_bit(f) && group_k(f) == kScaleK;
}

// One row of a span; its size of 144 bytes puts the words of a fragment's 8 rows into different banks.
struct alignas(16) SpanRow {
  int8_t q[kScaleK];  // of INT4 the first half
  int32_t sum[kSpanParts];
};

template <PackedFormat F, int kPanels, int kRows>
struct SpanStage {
  uint4 weight[kPanels][kSpanChunks<F>];
  SpanRow rows[kRows];
  float scale[kRows];
};

// Where 16 bytes of codes stand in shared memory, so that the 8 lanes that one cycle serves meet all banks.
__device__ __forceinline__ int swizzled(int chunk) { return chunk ^ (chunk >> 2 & 6); }

template <PackedFormat F>
__device__ __forceinline__ bool is_int4(const LinearParams& p, int span) {
  return takes_int4(F) && int64_t(span) * kScaleK < p.x_q.k4;
}

// Starts the copies of one span, by kThreads threads. k past the last and rows past m are zeros; panels past
// the last are the last again, and their sums not stored.
template <int kThreads, PackedFormat F, int kPanels, int kRows>
__device__ __forceinline__ void fetch_span(const LinearParams& p, SpanStage<F, kPanels, kRows>& stage,
                                           int first_panel, int64_t first_row, int span, int thread) {
  using Layout = GroupLayout<F>;
  constexpr int kGroupChunks = Layout::kBytes / 16, kScaleChunk = Layout::kScaleAt / 16;
  constexpr int kPartChunks = Layout::kCodeBytes / 16;
  const int num_parts = int(p.k / kGroupK), first_part = span * kSpanParts;
  const int last_panel = int(ceil_div(p.n, kPanelColumns)) - 1;
  const int parts = min(kSpanParts, num_parts - first_part);
  // Not the larger kernels' loops: they need the registers.
  [[maybe_unused]] constexpr int kUnroll = kPanels == 1 ? 8 : 1;
  const auto* const weight = static_cast<const uint4*>(p.weight);
#pragma unroll kUnroll
  for (int j = 0; j < int(ceil_div(kPanels * kSpanChunks<F>, kThreads)); ++j) {
    const int i = thread + j * kThreads, panel = i / kSpanChunks<F>, in_span = i % kSpanChunks<F>;
    if (kPanels * kSpanChunks<F> % kThreads != 0 && panel >= kPanels) break;
    const int group = in_span / kGroupChunks, chunk = in_span % kGroupChunks;
    const int to = group * kGroupChunks + (chunk < kScaleChunk ? swizzled(chunk) : chunk);
    const auto* from = weight + min(first_panel + panel, last_panel) * (panel_bytes(F, p.k) / 16) +
                       int64_t(span) * kSpanChunks<F> + in_span;
    bool inside = group * Layout::kParts < parts;
    if constexpr (Layout::kParts > 1) {  // the scales of a last group follow the codes that it has
      if (chunk < kScaleChunk) inside = chunk / kPartChunks < parts;
      else from -= (kSpanParts - parts) * kPartChunks;
    }
    ptx::cp_async<16>(&stage.weight[panel][to], inside ? from : weight, inside ? 16 : 0);
  }
  const bool int4 = is_int4<F>(p, span);
  const int shift = int4 ? 2 : 3, chunks = int4 ? 4 : 2 * parts;  // of 16 bytes, of a row
  const int64_t row_bytes = p.x_q.row_bytes(p.k);
  const int8_t* const q = p.x_q.q + (int4 ? span * (kScaleK / 2) : span * kScaleK - p.x_q.k4 / 2);
#pragma unroll kUnroll
  for (int i = thread; i < kRows << shift; i += kThreads) {
    const int r = i >> shift, chunk = i - (r << shift);
    const bool inside = first_row + r < p.m && chunk < chunks;
    const int8_t* from = q + (first_row + r) * row_bytes + 16 * chunk;
    ptx::cp_async<16>(stage.rows[r].q + 16 * chunk, inside ? from : p.x_q.q, inside ? 16 : 0);
  }
  if constexpr (Layout::kHasZero) {
#pragma unroll kUnroll
    for (int j = 0; j < int(ceil_div(kRows * kSpanParts, kThreads)); ++j) {
      const int i = thread + j * kThreads, r = i / kSpanParts, part = i % kSpanParts;
      if (kRows * kSpanParts % kThreads != 0 && r >= kRows) break;
      const bool inside = first_row + r < p.m && part < parts;
      const int32_t* from = p.x_q.sum + (first_row + r) * num_parts + first_part + part;
      ptx::cp_async<4>(stage.rows[r].sum + part, inside ? from : p.x_q.sum, inside ? 4 : 0);
    }
  }
  static_assert(kRows <= kThreads, "a thread fetches one row's scale at most");
  if (thread < kRows) {
    const bool inside = first_row + thread < p.m;
    const float* from = p.x_q.scale + (first_row + thread) * ceil_div(p.k, kScaleK) + span;
    ptx::cp_async<4>(stage.scale + thread, inside ? from : p.x_q.scale, inside ? 4 : 0);
  }
}

// What a lane needs of one panel's span, unpacked once for all rows.
template <PackedFormat F, bool kInt4>
struct SpanWeight {
  using Layout = GroupLayout<F>;
  static constexpr int kGroups = kSpanGroups<F>;
  // Signed nibbles become bytes in their high half: 16 times as large.
  static constexpr float kUnit = Layout::kFourBit && !Layout::kHasZero && !kInt4 ? 1.0f / 16 : 1.0f;
  // Of 32 k and a column: nibbles, or [0] k 4t .. 4t + 3, [1] k 16 + 4t .. 16 + 4t + 3.
  unsigned codes[kSpanParts][4][kInt4 ? 1 : 2];
  float scale[kGroups][4];
  float zero[Layout::kHasZero ? kGroups : 1][4];
};

// The codes of one column and 32 k from its words: one of 4-bit codes, two of 8-bit ones.
template <PackedFormat F, bool kInt4>
__device__ __forceinline__ void unpack(unsigned low, unsigned high, unsigned (&codes)[kInt4 ? 1 : 2]) {
  constexpr bool kSigned = !has_zero(F);
  if constexpr (kInt4) {
    codes[0] = low ^ 0x88888888u;
  } else if constexpr (!is_four_bit(F)) {
    codes[0] = kSigned ? low ^ 0x80808080u : low;
    codes[1] = kSigned ? high ^ 0x80808080u : high;
  } else if constexpr (kSigned) {
    codes[0] = (low << 4 ^ 0x80808080u) & 0xf0f0f0f0u;
    codes[1] = (low ^ 0x80808080u) & 0xf0f0f0f0u;
  } else {
    codes[0] = low & 0x0f0f0f0fu;
    codes[1] = low >> 4 & 0x0f0f0f0fu;
  }
}

struct alignas(8) FourHalfs { __half at[4]; };

template <PackedFormat F, bool kInt4>
__device__ __forceinline__ void load_weight(const uint4* panel, SpanWeight<F, kInt4>& w) {
  using Layout = GroupLayout<F>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kSpanGroups<F>; ++j) {
    const uint4* const group = panel + j * (Layout::kBytes / 16);
#pragma unroll
    for (int part = 0; part < Layout::kParts; ++part) {
      auto& codes = w.codes[j * Layout::kParts + part];
      const int chunk = part * (Layout::kCodeBytes / 16) + g / 4 * (Layout::kHalfBytes / 16) + t * 4 + g % 4;
      const uint4 low = group[swizzled(chunk)];
      const uint4 high = Layout::kFourBit ? low : group[swizzled(chunk + 16)];
      unpack<F, kInt4>(low.x, high.x, codes[0]);
      unpack<F, kInt4>(low.y, high.y, codes[1]);
      unpack<F, kInt4>(low.z, high.z, codes[2]);
      unpack<F, kInt4>(low.w, high.w, codes[3]);
    }
    const auto* scales = reinterpret_cast<const FourHalfs*>(group + Layout::kScaleAt / 16);  // then the zeros
    const FourHalfs scale = scales[g];
#pragma unroll
    for (int c = 0; c < 4; ++c) w.scale[j][c] = to_float(scale.at[c]) * SpanWeight<F, kInt4>::kUnit;
    if constexpr (Layout::kHasZero) {
      const FourHalfs zero = scales[kPanelColumns / 4 + g];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        w.zero[j][c] = kInt4 ? fmaf(8.0f, w.scale[j][c], to_float(zero.at[c])) : to_float(zero.at[c]);
    }
  }
}

// Integers are summed on top of the bits of 1.5 * 2^23, where they are the low bits of a float: |sum| stays
// below 2^22 (128 products of at most 255 * 127), so a subtraction converts it, four times as fast as I2F.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;
__device__ __forceinline__ float magic_to_float(int bits) { return __int_as_float(bits) - kMagic; }

// Products of 32 k (INT8) or 64 k (INT4) from `part` on, of columns 4g + 2h and 4g + 2h + 1. x: a row's words
// from t on.
template <PackedFormat F, bool kInt4>
__device__ __forceinline__ void multiply_part(const SpanWeight<F, kInt4>& w, int part, int h,
                                              const unsigned* x, int (&dot)[4]) {
  constexpr int kPartWords = kInt4 ? 4 : 8;
  const unsigned b[2] = {x[part * kPartWords], x[part * kPartWords + 4]};
  const auto &one = w.codes[part][2 * h], &two = w.codes[part][2 * h + 1];
  if constexpr (kInt4) {
    const auto& next = w.codes[part + 1];
    const unsigned a[4] = {one[0], two[0], next[2 * h][0], next[2 * h + 1][0]};
    ptx::mma_m16n8k64_s4(dot, a, b);
  } else {
    const unsigned a[4] = {one[0], two[0], one[1], two[1]};
    if constexpr (has_zero(F)) ptx::mma_m16n8k32_u8s8(dot, a, b);
    else ptx::mma_m16n8k32_s8(dot, a, b);
  }
}

// total += one span of 8 kTiles rows times the weight.
template <PackedFormat F, bool kInt4, int kTiles>
__device__ __forceinline__ void multiply_rows(const uint4* panel, const SpanRow* rows, const float* scales,
                                              Fragments<kTiles>& total) {
  constexpr int kParts = GroupLayout<F>::kParts;
  constexpr bool kHasZero = has_zero(F);
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  SpanWeight<F, kInt4> w;
  load_weight<F, kInt4>(panel, w);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const auto* const x = reinterpret_cast<const unsigned*>(rows[8 * tile + g].q) + t;
    const SpanRow* const mine = rows + 8 * tile + 2 * t;  // the two rows whose outputs the lane holds
    float acc[2][4] = {};
#pragma unroll
    for (int j = 0; j < kSpanGroups<F>; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int dot[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
        for (int part = 0; part < kParts; part += kInt4 ? 2 : 1)
          multiply_part<F, kInt4>(w, j * kParts + part, h, x, dot);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = 2 * h + i / 2;
          const float scale = w.scale[j][c];
          float& to = acc[h][i];
          // In one instruction: kMagic * scale is exact, for scale is a float16.
          if constexpr (kSpanGroups<F> == 1) to = fmaf(__int_as_float(dot[i]), scale, -kMagic * scale);
          else to = fmaf(magic_to_float(dot[i]), scale, to);
        }
      }
      if constexpr (kHasZero) {
        float sum[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int bits = kMagicBits;
#pragma unroll
          for (int part = 0; part < kParts; ++part) bits += mine[r].sum[j * kParts + part];
          sum[r] = magic_to_float(bits);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
          acc[i / 4][i % 4] = fmaf(w.zero[j][i / 2], sum[i % 2], acc[i / 4][i % 4]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& to = total[tile][i / 4][i % 4];
      to = fmaf(acc[i / 4][i % 4], scales[8 * tile + 2 * t + i % 2], to);
    }
  }
}

// The same for whatever the span's activations are: all of a warp goes one way.
template <PackedFormat F, int kTiles>
__device__ __forceinline__ void multiply_span(bool int4, const uint4* panel, const SpanRow* rows,
                                              const float* scales, Fragments<kTiles>& total) {
  if constexpr (takes_int4(F)) {
    if (int4) return multiply_rows<F, true, kTiles>(panel, rows, scales, total);
  }
  multiply_rows<F, false, kTiles>(panel, rows, scales, total);
}

}  // namespace tilestream::cuda
