// The two products of attention over one tile of keys: scores = q . K^T and out = alpha * out + P . V.
//
// Both read the cache in 64-byte vectors of the blocked order (types.h): a vector holds 16 lanes, which are keys for K
// and values of head_dim for V, and in each lane the 1, 2 or 4 neighbours of the reduced axis that one multiply-add
// takes. The other operand is broadcast, one 32-bit unit at a time. No horizontal sum anywhere, and an output's
// order of additions does not depend on how many rows or vectors a pass holds.
// Registers: rows x vectors accumulators; the sizes below leave room for the operands without spilling.
#pragma once

#include <type_traits>

#include "cpu/kv_block.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int kTileKeys = 128;  // measured on Zen 4: 5 % faster than 64, whose softmax step is half latency
constexpr int kTileBlocks = kTileKeys / kKvBlockTokens;

// Accumulator vectors that fit: 32 registers of 16 lanes, 16 of 8 (AVX2), 32 or 16 of 4.
// kChainLoads: the longest chain of additions in a score. Without FMA every step rounds twice, and short chains make up
// for it: test_large_logits needs them.
#if defined(__AVX512F__)
constexpr int kMostRows = 6, kMaxAccumulators = 24, kChainLoads = 256;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kMostRows = 6, kMaxAccumulators = 6, kChainLoads = 256;
#else
constexpr int kMostRows = 3, kMaxAccumulators = 3, kChainLoads = 8;
#endif

constexpr float kDigitBase = 128.0f;

// What a cache dtype's products are made of. A load (Vec) is kParts operands of a multiply-add (see part()), each of
// which has kUnit values of the reduced axis in a lane. Acc: accumulator; kDigits: accumulators of a row.
// kQuantised: the products are of integers, of which kCentre was subtracted, and scaled afterwards.
struct FloatProduct {
  using Acc = F32x16;
  static constexpr bool kQuantised = false;
  static constexpr int kParts = 1, kUnit = 1, kDigits = 1, kCentre = 0;
  static Acc empty() { return zero(); }
  static F32x16 unit(const uint32_t* u) { return set1(*reinterpret_cast<const float*>(u)); }
  static Acc multiply_add(Acc acc, F32x16 v, F32x16 u) { return fma(v, u, acc); }
  template <class Sums>
  __attribute__((always_inline)) static F32x16 value(const Sums& sums, int row, int n) { return sums[row][n]; }
};
struct Float32Cache : Float32Order, FloatProduct {
  using Vec = F32x16;
  static Vec read(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static F32x16 part(Vec v, int) { return v; }
};
struct Float16Cache : Float16Order, FloatProduct {
  using Vec = F32x16;
  static Vec read(const char* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
  static F32x16 part(Vec v, int) { return v; }
};

// Pairs in bfloat16.
struct BFloat16Product : FloatProduct {
  static constexpr int kUnit = 2;
  static Bf16x32 unit(const uint32_t* u) { return set1_bf16_pair(*u); }
  static Acc multiply_add(Acc acc, Bf16x32 v, Bf16x32 u) { return dot_bf16(acc, v, u); }
};
struct BFloat16Cache : BFloat16Order, BFloat16Product {
  using Vec = Bf16x32;
  static Vec read(const char* p) { return load_bf16x32(p); }
  static Bf16x32 part(Vec v, int) { return v; }
};

// bfloat16 holds every e4m3, and what it rounds of q is a thirtieth of what e4m3 rounded of K.
struct Float8Cache : Float8Order, BFloat16Product {
  using Vec = U8x64;
  static constexpr int kParts = 2;
  static Vec read(const char* p) { return load_u8x64(p); }
  static Bf16x32 part(Vec v, int part) { return part == 0 ? e4m3_pairs<0>(v) : e4m3_pairs<1>(v); }
};

// Integers under a 16-bit q: exact integer products with q and the weights as two digits (attention_digits.h).
// in_register on each sum: GCC 12 otherwise stores integer accumulators to memory in every round of the loop.
struct IntegerProduct {
  using Acc = I32x16;
  using Vec = U8x64;
  static constexpr bool kQuantised = true;
  static constexpr int kUnit = 4, kDigits = 2, kCentre = 0;
  static Acc empty() { return izero(); }
  static Vec read(const char* p) { return load_u8x64(p); }
  static int32_t unit(const uint32_t* u) { return int32_t(*u); }
  static Acc multiply_add(Acc acc, U8x64 v, int32_t u) { return in_register(dot_u8s8(acc, v, u)); }
  template <class Sums>
  __attribute__((always_inline)) static F32x16 value(const Sums& sums, int row, int n) {
    return fma(to_float(sums[2 * row][n]), set1(kDigitBase), to_float(sums[2 * row + 1][n]));
  }
};
struct Int8Cache : Int8Order, IntegerProduct {
  static constexpr int kParts = 1;
  static U8x64 part(Vec v, int) { return v; }
};
struct Int4Cache : Int4Order, IntegerProduct {
  static constexpr int kParts = 2;
  static U8x64 part(Vec v, int part) { return part == 0 ? and_0f(v) : shift_right_4(v); }
};

// Integers under a float32 q, as floats. Centred, so that the sums are about as large as those of the values.
inline F32x16 centred_byte(U8x64 v, int byte, int centre) {
  switch (byte) {
    case 0: return byte_minus<0>(v, centre);
    case 1: return byte_minus<1>(v, centre);
    case 2: return byte_minus<2>(v, centre);
    default: return byte_minus<3>(v, centre);
  }
}
struct FloatInt8Cache : Int8Order, FloatProduct {
  using Vec = U8x64;
  static constexpr bool kQuantised = true;
  static constexpr int kParts = 4, kCentre = 128;
  static Vec read(const char* p) { return load_u8x64(p); }
  static F32x16 part(Vec v, int part) { return centred_byte(v, part, kCentre); }
};
struct FloatInt4Cache : Int4Order, FloatProduct {
  using Vec = U8x64;
  static constexpr bool kQuantised = true;
  static constexpr int kParts = 8, kCentre = 8;
  static Vec read(const char* p) { return load_u8x64(p); }
  static F32x16 part(Vec v, int part) {
    return centred_byte(part < 4 ? and_0f(v) : shift_right_4(v), part % 4, kCentre);
  }
};

// A load that is taken apart needs registers for its parts.
template <class C>
constexpr int kAccumulators = C::kParts == 1 ? kMaxAccumulators : kMaxAccumulators * 2 / 3;
// Rows of one pass over a tile, and vectors that it holds for `rows` rows.
template <class C>
constexpr int kMaxRows = kMostRows * C::kDigits <= kAccumulators<C> ? kMostRows : kAccumulators<C> / C::kDigits;
template <class C>
constexpr int pass_width(int rows) {
  int width = 1;
  while (2 * width <= kTileBlocks && 2 * width * rows * C::kDigits <= kAccumulators<C>) width *= 2;
  return width;
}
// Bytes of one load, values of the reduced axis that it covers, and 32-bit units of `num` such values.
template <class C>
constexpr int kLoadBytes = 16 * C::kPair * int(sizeof(typename C::Element));
template <class C>
constexpr int kLoadValues = C::kUnit * C::kParts;
template <class C>
constexpr int num_units(int num) { return num / C::kUnit; }

// Where one tile's blocks lie. The kernels prefetch `next` while they read a tile; it may be the same.
struct TileBlocks {
  const char *k[kTileBlocks], *v[kTileBlocks];
  const uint16_t *k_scales[kTileBlocks], *v_scales[kTileBlocks];  // (scale, zero) pairs of quantised caches
};

// Into L2: prefetches into L1 wait for its 24 miss registers and halve the rate from DRAM. From several pages in turn:
// one page after the other leaves banks of memory idle. Measured on Zen 4, one thread, shuffled pages of 4 KB: 11 GB/s
// into L1, 21 into L2, 28 into L2 from four pages in turn (31 where the keys are contiguous).
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// Loads n .. n + kNum of one side of the next tile, counted in this order: four loads of each block, then the next
// four; of the blocks first every second one, because two neighbours lie in one page of 32 tokens.
template <class C, int kNum>
__attribute__((always_inline)) inline void prefetch_loads(const char* const* blocks, int n) {
  constexpr int kBurst = 4;
#pragma GCC unroll 2
  for (int k = 0; k < kNum; k += kBurst) {
    const int turn = (n + k) / kBurst, m = turn % kTileBlocks;
    const int first = turn / kTileBlocks * kBurst + (kNum < kBurst ? n % kBurst : 0);
    const char* at = blocks[m % (kTileBlocks / 2) * 2 + m / (kTileBlocks / 2)] + first * kLoadBytes<C>;
#pragma GCC unroll 4
    for (int j = 0; j < kBurst && j < kNum; ++j) prefetch(at + j * kLoadBytes<C>);
  }
}

// (scale, zero) of a tile's keys. V's are 0 for keys outside the job, whose memory may hold NaN.
struct TileScales {
  float k_scale[kTileKeys], k_zero[kTileKeys], v_scale[kTileKeys], v_zero[kTileKeys];
};

// Per row, what products of integers still need: the factor that they stand for, and the sum that meets the zeros.
struct RowScales {
  const float *factor, *sum;
};

// scores[r][16 b + lane] for kBlocks blocks from `block` on.
template <class C, int kRows, int kBlocks>
__attribute__((always_inline)) inline void scores_pass(const uint32_t* q, int units, const TileBlocks& tile,
                                                       const TileBlocks& next, int block, const TileScales& keys,
                                                       RowScales rows, float* scores) {
  constexpr int kProducts = kRows * C::kDigits;
  constexpr int kChain = kChainLoads / C::kParts;
  const int loads = units / C::kParts;
  for (int begin = 0; begin < loads; begin += kChain) {
    const int end = loads - begin < kChain ? loads : begin + kChain;
    typename C::Acc acc[kProducts][kBlocks];
#pragma GCC unroll 12
    for (int r = 0; r < kProducts; ++r) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = C::empty();
    }
    for (int i = begin; i < end; ++i) {
      typename C::Vec k[kBlocks];
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        k[b] = in_register(C::read(tile.k[block + b] + int64_t(i) * kLoadBytes<C>));
      }
      prefetch_loads<C, kBlocks>(next.k, block * loads + i * kBlocks);
#pragma GCC unroll 8
      for (int part = 0; part < C::kParts; ++part) {
        decltype(C::part(k[0], part)) operand[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) operand[b] = C::part(k[b], part);
#pragma GCC unroll 12
        for (int r = 0; r < kProducts; ++r) {
          const auto unit = C::unit(q + int64_t(r) * units + i * C::kParts + part);
#pragma GCC unroll 8
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = C::multiply_add(acc[r][b], operand[b], unit);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const int key = (block + b) * 16;
        float* s = scores + r * kTileKeys + key;
        F32x16 value = C::value(acc, r, b);
        if (begin > 0) value = add(load(s), value);
        if (C::kQuantised && end == loads) {
          const F32x16 shift = mul(load(keys.k_zero + key), set1(rows.sum[r]));
          value = fma(mul(value, set1(rows.factor[r])), load(keys.k_scale + key), shift);
        }
        store(s, value);
      }
    }
  }
}

template <class C, int kRows>
__attribute__((noinline)) void scores_rows(const uint32_t* q, int units, const TileBlocks& tile, const TileBlocks& next,
                                           int block_begin, int block_end, const TileScales& keys, RowScales rows,
                                           float* scores) {
  constexpr int kWidth = pass_width<C>(kRows);
  int b = block_begin;
  for (; b + kWidth <= block_end; b += kWidth) {
    scores_pass<C, kRows, kWidth>(q, units, tile, next, b, keys, rows, scores);
  }
  if constexpr (kWidth > 1) {
    for (; b < block_end; ++b) scores_pass<C, kRows, 1>(q, units, tile, next, b, keys, rows, scores);
  }
}

// out[r][d] = alpha[r] * out[r][d] + the sum over the tile's tokens, for kVecs vectors of head_dim from d on.
template <class C, int kRows, int kVecs>
__attribute__((always_inline)) inline void values_pass(const uint32_t* p, const TileBlocks& tile,
                                                       const TileBlocks& next, int block_begin, int block_end,
                                                       int head_dim, int d, const float* alpha, RowScales rows,
                                                       float* out) {
  constexpr int kProducts = kRows * C::kDigits, kBlockLoads = kKvBlockTokens / kLoadValues<C>;
  constexpr int kRowUnits = num_units<C>(kTileKeys), kBlockUnits = num_units<C>(kKvBlockTokens);
  const int64_t row_bytes = int64_t(head_dim) / 16 * kLoadBytes<C>;
  const int64_t begin = int64_t(d) / 16 * kLoadBytes<C>;
  typename C::Acc acc[kProducts][kVecs];
#pragma GCC unroll 12
  for (int r = 0; r < kProducts; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) acc[r][n] = C::empty();
  }
  for (int b = block_begin; b < block_end; ++b) {
    for (int i = 0; i < kBlockLoads; ++i) {
      typename C::Vec v[kVecs];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) {
        v[n] = in_register(C::read(tile.v[b] + begin + i * row_bytes + n * kLoadBytes<C>));
      }
      prefetch_loads<C, kVecs>(next.v, d / 16 * kTileBlocks * kBlockLoads + (b * kBlockLoads + i) * kVecs);
#pragma GCC unroll 8
      for (int part = 0; part < C::kParts; ++part) {
        decltype(C::part(v[0], part)) operand[kVecs];
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) operand[n] = C::part(v[n], part);
#pragma GCC unroll 12
        for (int r = 0; r < kProducts; ++r) {
          const auto unit = C::unit(p + r * kRowUnits + b * kBlockUnits + i * C::kParts + part);
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) acc[r][n] = C::multiply_add(acc[r][n], operand[n], unit);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) {
      float* o = out + int64_t(r) * head_dim + d + 16 * n;
      F32x16 sum = C::value(acc, r, n);
      if constexpr (C::kQuantised) sum = fma(sum, set1(rows.factor[r]), set1(rows.sum[r]));
      store(o, fma(load(o), set1(alpha[r]), sum));
    }
  }
}

template <class C, int kRows>
__attribute__((noinline)) void values_rows(const uint32_t* p, const TileBlocks& tile, const TileBlocks& next,
                                           int block_begin, int block_end, int head_dim, const float* alpha,
                                           RowScales rows, float* out) {
  constexpr int kWidth = pass_width<C>(kRows);
  int d = 0;
  const auto pass = [&](auto vecs) __attribute__((always_inline)) {
    values_pass<C, kRows, vecs>(p, tile, next, block_begin, block_end, head_dim, d, alpha, rows, out);
    d += 16 * vecs;
  };
  while (d + 16 * kWidth <= head_dim) pass(std::integral_constant<int, kWidth>());
  if constexpr (kWidth > 4) {
    if (head_dim - d >= 64) pass(std::integral_constant<int, 4>());
  }
  if constexpr (kWidth > 2) {
    if (head_dim - d >= 32) pass(std::integral_constant<int, 2>());
  }
  if constexpr (kWidth > 1) {
    if (head_dim - d >= 16) pass(std::integral_constant<int, 1>());
  }
}

// q: [rows][digits][units]; scores: [rows][kTileKeys], blocks outside block_begin .. block_end untouched.
// rows in 1 .. kMaxRows.
template <class C, int kRows = kMaxRows<C>, class... Args>
void tile_scores(int rows, const Args&... args) {
  if (rows == kRows) return scores_rows<C, kRows>(args...);
  if constexpr (kRows > 1) tile_scores<C, kRows - 1>(rows, args...);
}

// p: [rows][digits][units of kTileKeys tokens]; out: [rows][head_dim].
template <class C, int kRows = kMaxRows<C>, class... Args>
void tile_values(int rows, const Args&... args) {
  if (rows == kRows) return values_rows<C, kRows>(args...);
  if constexpr (kRows > 1) tile_values<C, kRows - 1>(rows, args...);
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
