// The two products of attention over one tile of keys: scores = q . K^T and out = alpha * out + P . V.
//
// Both read the cache in 64-byte vectors of the blocked order (types.h): a vector holds 16 lanes, which are keys for K
// and values of head_dim for V, and in each lane the 1, 2 or 4 neighbours of the reduced axis that one multiply-add
// takes. The other operand is broadcast, one 32-bit unit at a time. No horizontal sum anywhere, and an output's
// order of additions does not depend on how many rows or vectors a pass holds.
// Registers: rows x vectors accumulators; the sizes below leave room for the operands without spilling.
#pragma once

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
constexpr int kMaxRows = 6, kMaxAccumulators = 24, kChainLoads = 256;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kMaxRows = 6, kMaxAccumulators = 6, kChainLoads = 256;
#else
constexpr int kMaxRows = 3, kMaxAccumulators = 3, kChainLoads = 8;
#endif

// Vectors one pass holds for `rows` rows.
constexpr int pass_width(int rows, int most) {
  int width = 1;
  while (2 * width <= most && 2 * width * rows <= kMaxAccumulators) width *= 2;
  return width;
}

// Into L2: prefetches into L1 wait for its 24 miss registers and halve the rate from DRAM (measured on Zen 4: 11 GB/s
// against 24 on one thread).
inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// What a cache dtype's products are made of. Acc: accumulator; Vec: one load; kParts: multiply-adds per load.
struct FloatProduct {
  using Acc = F32x16;
  static constexpr bool kInteger = false;
  static constexpr int kParts = 1;
  static Acc empty() { return zero(); }
  static F32x16 result(Acc a) { return a; }
};
struct Float32Cache : Float32Order, FloatProduct {
  using Vec = F32x16;
  static Vec read(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static F32x16 unit(const uint32_t* u) { return set1(*reinterpret_cast<const float*>(u)); }
  static Acc multiply_add(Acc acc, Vec v, int, F32x16 u) { return fma(v, u, acc); }
};
struct Float16Cache : Float16Order, FloatProduct {
  using Vec = F32x16;
  static Vec read(const char* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
  static F32x16 unit(const uint32_t* u) { return set1(*reinterpret_cast<const float*>(u)); }
  static Acc multiply_add(Acc acc, Vec v, int, F32x16 u) { return fma(v, u, acc); }
};
struct BFloat16Cache : BFloat16Order, FloatProduct {
  using Vec = Bf16x32;
  static Vec read(const char* p) { return load_bf16x32(p); }
  static Bf16x32 unit(const uint32_t* u) { return set1_bf16_pair(*u); }
  static Acc multiply_add(Acc acc, Vec v, int, Bf16x32 u) { return dot_bf16(acc, v, u); }
};
// in_register on each sum: GCC 12 otherwise stores integer accumulators to memory in every round of the loop.
struct IntegerProduct {
  using Acc = I32x16;
  static constexpr bool kInteger = true;
  static Acc empty() { return izero(); }
  static F32x16 result(Acc a) { return to_float(a); }  // exact: below 2^24
};
struct Int8Cache : Int8Order, IntegerProduct {
  using Vec = U8x64;
  static constexpr int kParts = 1;
  static Vec read(const char* p) { return load_u8x64(p); }
  static int32_t unit(const uint32_t* u) { return int32_t(*u); }
  static Acc multiply_add(Acc acc, Vec v, int, int32_t u) { return in_register(dot_u8s8(acc, v, u)); }
};
struct Int4Cache : Int4Order, IntegerProduct {
  using Vec = U8x64;
  static constexpr int kParts = 2;
  static Vec read(const char* p) { return load_u8x64(p); }
  static int32_t unit(const uint32_t* u) { return int32_t(*u); }
  static Acc multiply_add(Acc acc, Vec v, int part, int32_t u) {
    return in_register(dot_u8s8(acc, part == 0 ? and_0f(v) : shift_right_4(v), u));
  }
};

// Bytes of one load, values of the reduced axis that it covers, and 32-bit units of `num` such values.
template <class C>
constexpr int kLoadBytes = 16 * C::kPair * int(sizeof(typename C::Element));
template <class C>
constexpr int kLoadValues = C::kPair * C::kParts;
template <class C>
constexpr int num_units(int num) { return num / C::kPair; }

// One tile's blocks. The `next_` blocks are prefetched at the place where this tile is read; they may be the same.
struct TileBlocks {
  const char *k[kTileBlocks], *v[kTileBlocks];
  const char *next_k[kTileBlocks], *next_v[kTileBlocks];
};

// scores[r][16 b + lane] for kBlocks blocks from `block` on.
template <class C, int kRows, int kBlocks>
__attribute__((always_inline)) inline void scores_pass(const uint32_t* q, int units, const TileBlocks& tile, int block,
                                                       float* scores) {
  const int loads = units / C::kParts;
  for (int begin = 0; begin < loads; begin += kChainLoads) {
    const int end = loads - begin < kChainLoads ? loads : begin + kChainLoads;
    typename C::Acc acc[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = C::empty();
    }
    for (int i = begin; i < end; ++i) {
      typename C::Vec k[kBlocks];
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        k[b] = in_register(C::read(tile.k[block + b] + int64_t(i) * kLoadBytes<C>));
        prefetch(tile.next_k[block + b] + int64_t(i) * kLoadBytes<C>);
      }
#pragma GCC unroll 2
      for (int part = 0; part < C::kParts; ++part) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto unit = C::unit(q + int64_t(r) * units + i * C::kParts + part);
#pragma GCC unroll 8
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = C::multiply_add(acc[r][b], k[b], part, unit);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        float* s = scores + r * kTileKeys + (block + b) * 16;
        store(s, begin == 0 ? C::result(acc[r][b]) : add(load(s), C::result(acc[r][b])));
      }
    }
  }
}

template <class C, int kRows>
__attribute__((noinline)) void scores_rows(const uint32_t* q, int units, const TileBlocks& tile, int block_begin,
                                           int block_end, float* scores) {
  constexpr int kWidth = pass_width(kRows, kTileBlocks);
  int b = block_begin;
  for (; b + kWidth <= block_end; b += kWidth) scores_pass<C, kRows, kWidth>(q, units, tile, b, scores);
  if constexpr (kWidth > 1) {
    for (; b < block_end; ++b) scores_pass<C, kRows, 1>(q, units, tile, b, scores);
  }
}

// The sum over the tile's tokens for kVecs vectors of head_dim from d on.
// Float products: out[r][d] = alpha[r] * out[r][d] + sum. Integer products: out[r][d] = sum, scaled by the caller.
template <class C, int kRows, int kVecs>
__attribute__((always_inline)) inline void values_pass(const uint32_t* p, const TileBlocks& tile, int block_begin,
                                                       int block_end, int head_dim, int d, const float* alpha, float* out) {
  constexpr int kBlockLoads = kKvBlockTokens / kLoadValues<C>;
  constexpr int kRowUnits = num_units<C>(kTileKeys), kBlockUnits = num_units<C>(kKvBlockTokens);
  const int64_t row_bytes = int64_t(head_dim) / 16 * kLoadBytes<C>;
  const int64_t begin = int64_t(d) / 16 * kLoadBytes<C>;
  typename C::Acc acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) acc[r][n] = C::empty();
  }
  for (int b = block_begin; b < block_end; ++b) {
    for (int i = 0; i < kBlockLoads; ++i) {
      typename C::Vec v[kVecs];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) {
        const int64_t at = begin + i * row_bytes + n * kLoadBytes<C>;
        v[n] = in_register(C::read(tile.v[b] + at));
        prefetch(tile.next_v[b] + at);
      }
#pragma GCC unroll 2
      for (int part = 0; part < C::kParts; ++part) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto unit = C::unit(p + r * kRowUnits + b * kBlockUnits + i * C::kParts + part);
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) acc[r][n] = C::multiply_add(acc[r][n], v[n], part, unit);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) {
      float* o = out + int64_t(r) * head_dim + d + 16 * n;
      const F32x16 sum = C::result(acc[r][n]);
      store(o, C::kInteger ? sum : fma(load(o), set1(alpha[r]), sum));
    }
  }
}

template <class C, int kRows>
__attribute__((noinline)) void values_rows(const uint32_t* p, const TileBlocks& tile, int block_begin, int block_end,
                                           int head_dim, const float* alpha, float* out) {
  constexpr int kWidth = pass_width(kRows, 8);
  int d = 0;
  for (; d + 16 * kWidth <= head_dim; d += 16 * kWidth) {
    values_pass<C, kRows, kWidth>(p, tile, block_begin, block_end, head_dim, d, alpha, out);
  }
  if constexpr (kWidth > 4) {
    if (head_dim - d >= 64) values_pass<C, kRows, 4>(p, tile, block_begin, block_end, head_dim, d, alpha, out), d += 64;
  }
  if constexpr (kWidth > 2) {
    if (head_dim - d >= 32) values_pass<C, kRows, 2>(p, tile, block_begin, block_end, head_dim, d, alpha, out), d += 32;
  }
  if constexpr (kWidth > 1) {
    if (head_dim - d >= 16) values_pass<C, kRows, 1>(p, tile, block_begin, block_end, head_dim, d, alpha, out);
  }
}

// q: [rows][units]; scores: [rows][kTileKeys], blocks outside block_begin .. block_end untouched. rows in 1 .. kMaxRows.
template <class C, int kRows = kMaxRows>
void tile_scores(int rows, const uint32_t* q, int units, const TileBlocks& tile, int block_begin, int block_end,
                 float* scores) {
  if (rows == kRows) return scores_rows<C, kRows>(q, units, tile, block_begin, block_end, scores);
  if constexpr (kRows > 1) tile_scores<C, kRows - 1>(rows, q, units, tile, block_begin, block_end, scores);
}

// p: [rows][units of kTileKeys tokens]; out: [rows][head_dim].
template <class C, int kRows = kMaxRows>
void tile_values(int rows, const uint32_t* p, const TileBlocks& tile, int block_begin, int block_end, int head_dim,
                 const float* alpha, float* out) {
  if (rows == kRows) return values_rows<C, kRows>(p, tile, block_begin, block_end, head_dim, alpha, out);
  if constexpr (kRows > 1) tile_values<C, kRows - 1>(rows, p, tile, block_begin, block_end, head_dim, alpha, out);
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
