// Tile kernels of linear.cpp: R rows of activations x 32 columns of one panel, over all of K.
//
// Quantised: per group of 32 or 128 k an exact int32 inner product per (row, column), then in group order
//     span = span + float(int32) * weight_scale   (+ weight_zero * float(x_sum))
// and at the end of each span of 128 k that share an activation scale, total = total + span * x_scale.
// Float formats: sums of blocks of K, added up, so that the error grows with their number only.
// The same operations for every R: a row's result does not depend on its tile.
// Budget per row, 16 columns and 128 k on AVX-512 VNNI: 32 vpdpbusd share the two multiply pipes with the FMAs of the
// scales, in groups of 128: 2 (3 where zeros are stored), in groups of 32: 5 (9). So the limit is 32/34 (32/35) or 32/37
// (32/41) of the vpdpbusd peak. Conversion and unpacking go elsewhere and cost nothing: 4-bit tiles run as fast as 8-bit
// ones. vpmaddubsw uses the same pipes, so mixing it in gains nothing. Registers: 8 rows x 2 vectors of int32 in groups of
// 128; 6 x 2 of int32 and as many float sums in groups of 32; 2 weights, mask, scales. Totals stay in memory. From 4 rows
// on more make a tile no faster; they spare reading the weights again.
#pragma once

#include <utility>

#include "cpu/elements.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// Rows and 16-column vectors held at once: as many as fit the registers.
#if defined(__AVX512VNNI__)
template <PackedFormat F>
constexpr int kTileRows = group_k(F) == kScaleK ? 8 : 6;
constexpr int kTileVectors = 2;
#elif defined(__AVX512F__)
template <PackedFormat F>
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#else
template <PackedFormat F>
constexpr int kTileRows = 4;  // 16 registers of 8 or 4 lanes: one vector at a time
constexpr int kTileVectors = 1;
#endif

// Tiles this small are bound by reading the weights, so they read them strictly forwards: the hardware then
// prefetches at full rate (8-bit codes, one row: 12 GB/s with the two halves interleaved, 35 GB/s forwards,
// on a Zen 4 core that reads 34 GB/s). More rows would spill registers in that order.
constexpr int kStreamedRows = 3;

// A kernel fetches a few lines of the next panel every so many k: one round of its main loop.
template <PackedFormat F>
constexpr int64_t kFetchStepK = F == PackedFormat::kFloat32    ? 8
                                : F == PackedFormat::kBFloat16 ? 16
                                                               : kGroupK;

constexpr int64_t kBlockSteps = 128;  // float formats: 4-byte steps of x summed before they join the total

struct TileArgs {
  const uint8_t* panel;
  const uint8_t* x;     // the tile's first row: int8 or floats
  int64_t x_row_bytes;  // from one row to the next
  const float* scale;   // int8: [rows][num_spans] and
  const int32_t* sum;   // [rows][num_groups] of tilestream/quantise.h
  int64_t k;
  float* out;           // [rows][32]
  bool adds;            // float formats: to what `out` holds
  const uint8_t* next;  // what to fetch into L2 meanwhile (a part of the next panel)
  int next_lines;       // cache lines of it per kFetchStepK
};

inline int32_t load_word(const void* p) {
  int32_t w;
  std::memcpy(&w, p, 4);
  return w;
}
inline float load_float(const void* p) {
  float f;
  std::memcpy(&f, p, 4);
  return f;
}

inline void fetch_lines(const uint8_t*& p, int num) {
  for (int i = 0; i < num; ++i, p += 64) __builtin_prefetch(p, 0, 2);
}

// Weights of the 4 k from 4v (half 0) or 16 + 4v (half 1) of 32.
template <bool kFourBit>
inline U8x64 load_codes(const uint8_t* codes, int v, int half) {
  if constexpr (kFourBit) {
    const U8x64 packed = load_u8x64(codes + 64 * v);
    return half == 0 ? and_0f(packed) : shift_right_4(packed);
  } else {
    return load_u8x64(codes + 64 * (v + 4 * half));
  }
}

// Inner products of one row and 16 columns over 32 k, begun at `start`.
template <bool kFourBit>
struct GroupProducts {
  I32x16 sum;
  static GroupProducts begin(I32x16 start) { return {start}; }
  void add(U8x64 codes, int32_t word) { sum = dot_u8s8(sum, codes, word); }
  I32x16 end(I32x16) const { return sum; }
};
template <>
struct GroupProducts<true> {
  Nibbles sum;
  static GroupProducts begin(I32x16 start) { return {begin_u4(start)}; }
  void add(U8x64 codes, int32_t word) { sum = dot_u4s8(sum, codes, word); }
  I32x16 end(I32x16 start) const { return end_u4(sum, start); }
};

// Sum of x over `parts` times 32 k.
inline int32_t add_sums(const int32_t* sum, int parts) {
  int32_t s = sum[0];
  switch (parts) {
    case 4: s += sum[3]; [[fallthrough]];
    case 3: s += sum[2]; [[fallthrough]];
    case 2: s += sum[1];
  }
  return s;
}

// acc += one group of `parts` times 32 k: R rows of x, V vectors of 16 columns, sums of x from `sum` on.
template <PackedFormat F, int R, int V>
[[gnu::always_inline]] inline void add_group(const uint8_t* x, int64_t x_row_bytes, const uint8_t* group, int first_vector,
                                             const int32_t* sum, int64_t sum_stride, int parts, F32x16 (&acc)[R][V]) {
  using Layout = GroupLayout<F>;
  using Products = GroupProducts<Layout::kFourBit>;
  int32_t x_sums[R];
  I32x16 dots[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    x_sums[r] = Layout::kParts == 1 ? sum[r * sum_stride] : add_sums(sum + r * sum_stride, parts);
    for (int j = 0; j < V; ++j) dots[r][j] = Layout::kHasZero ? izero() : set1_int(x_sums[r] * -Layout::kOffset);
  }
  for (int i = 0; i < parts; ++i, x += kGroupK, group += Layout::kCodeBytes) {
    Products products[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) products[r][j] = Products::begin(dots[r][j]);
    }
    const auto dot_vectors = [&](int v, int begin, int end) __attribute__((always_inline)) {
      for (int half = 0; half < 2; ++half) {
        if constexpr (R > kStreamedRows) load_no_earlier();  // or accumulators leave their registers: 7%
        U8x64 codes[V];
        for (int j = begin; j < end; ++j) {
          codes[j] = load_codes<Layout::kFourBit>(group + (first_vector + j) * Layout::kHalfBytes, v, half);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int32_t word = load_word(x + r * x_row_bytes + 4 * v + 16 * half);
          for (int j = begin; j < end; ++j) products[r][j].add(codes[j], word);
        }
      }
    };
    if constexpr (R <= kStreamedRows) {
      for (int j = 0; j < V; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < kGroupK / 8; ++v) dot_vectors(v, j, j + 1);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kGroupK / 8; ++v) dot_vectors(v, 0, V);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) dots[r][j] = products[r][j].end(dots[r][j]);
    }
  }
  const auto* const scales = reinterpret_cast<const uint16_t*>(group) + 16 * first_vector;
  for (int j = 0; j < V; ++j) {
    const F32x16 scale = load_f16(scales + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][j] = fma(to_float(dots[r][j]), scale, acc[r][j]);
    if constexpr (Layout::kHasZero) {
      const F32x16 z = load_f16(scales + kPanelColumns + 16 * j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][j] = fma(z, set1(float(x_sums[r])), acc[r][j]);
    }
  }
}

template <PackedFormat F, int R, int V>
inline void quantised_vectors(const TileArgs& a, int first_vector) {
  using Layout = GroupLayout<F>;
  constexpr int kSpanParts = kScaleK / kGroupK;
  const int64_t num_parts = a.k / kGroupK, num_spans = ceil_div(a.k, kScaleK);
  float* out = a.out + 16 * first_vector;
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < V; ++j) store(out + r * kPanelColumns + 16 * j, zero());
  const uint8_t* x = a.x;
  const uint8_t* group = a.panel;
  const uint8_t* next = a.next;
  for (int64_t span = 0; span < num_spans; ++span) {
    F32x16 acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) acc[r][j] = zero();
    const int64_t first = span * kSpanParts, left = num_parts - first;
    const int parts = left < kSpanParts ? int(left) : kSpanParts;
    if constexpr (Layout::kParts == 1) {
      for (int i = 0; i < parts; ++i, x += kGroupK, group += Layout::kBytes) {
        fetch_lines(next, a.next_lines);
        add_group<F, R, V>(x, a.x_row_bytes, group, first_vector, a.sum + first + i, num_parts, 1, acc);
      }
    } else {
      fetch_lines(next, parts * a.next_lines);
      add_group<F, R, V>(x, a.x_row_bytes, group, first_vector, a.sum + first, num_parts, parts, acc);
      x += kScaleK, group += Layout::kBytes;
    }
    for (int r = 0; r < R; ++r) {
      const F32x16 scale = set1(a.scale[r * num_spans + span]);
      for (int j = 0; j < V; ++j) {
        float* total = out + r * kPanelColumns + 16 * j;
        store(total, fma(acc[r][j], scale, load(total)));
      }
    }
  }
}

template <PackedFormat F, int R, int V>
inline void float_vectors(const TileArgs& a, int first_vector) {
  constexpr bool kPairs = F == PackedFormat::kBFloat16;  // one 4-byte step of x is two bfloat16 or one float
  constexpr int64_t kRound = 8;                          // steps per round
  const int64_t steps = kPairs ? ceil_div(a.k, 2) : a.k;
  F32x16 total[R][V], acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < V; ++j) total[r][j] = a.adds ? load(a.out + r * kPanelColumns + 16 * (first_vector + j)) : zero();
  const uint8_t* w = a.panel + 64 * first_vector;
  const uint8_t* next = a.next;
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const uint8_t* x = a.x + r * a.x_row_bytes + 4 * i;
      for (int j = 0; j < V; ++j) {
        const uint8_t* weights = w + i * 4 * kPanelColumns + 64 * j;
        if constexpr (kPairs) {
          acc[r][j] = dot_bf16(acc[r][j], load_bf16x32(weights), set1_bf16_pair(uint32_t(load_word(x))));
        } else {
          acc[r][j] = fma(load(reinterpret_cast<const float*>(weights)), set1(load_float(x)), acc[r][j]);
        }
      }
    }
  };
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    const int64_t end = begin + kBlockSteps < steps ? begin + kBlockSteps : steps;
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) acc[r][j] = zero();
    int64_t i = begin;
    for (; i + kRound <= end; i += kRound) {
      fetch_lines(next, a.next_lines);
#pragma GCC unroll 8
      for (int64_t s = 0; s < kRound; ++s) step(i + s);
    }
    for (; i < end; ++i) step(i);
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) total[r][j] = add(total[r][j], acc[r][j]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < V; ++j) store(a.out + r * kPanelColumns + 16 * (first_vector + j), total[r][j]);
}

template <PackedFormat F, int R>
void run_tile(const TileArgs& a) {
  for (int vector = 0; vector < kPanelColumns / 16; vector += kTileVectors) {
    if constexpr (F == PackedFormat::kFloat32 || F == PackedFormat::kBFloat16) {
      float_vectors<F, R, kTileVectors>(a, vector);
    } else {
      quantised_vectors<F, R, kTileVectors>(a, vector);
    }
  }
}

using TileFn = void (*)(const TileArgs&);

// Kernel for tiles of 1..kTileRows rows: kRun[rows - 1].
template <PackedFormat F, class Rows = std::make_integer_sequence<int, kTileRows<F>>>
struct TileTable;
template <PackedFormat F, int... kRowsLessOne>
struct TileTable<F, std::integer_sequence<int, kRowsLessOne...>> {
  static constexpr TileFn kRun[] = {run_tile<F, kRowsLessOne + 1>...};
};

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
