// The blocked page order (KvLayout::kBlocked) as code: where each element of a page lies, and a token's row of it.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/simd/vec.h"
#include "tilestream/types.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// The stored form of one cache dtype. kPair: values of the reduced axis (head_dim for K, tokens for V) that lie side
// by side in one 32-bit lane; kNibbles: two such lanes share their bytes.
template <class T, int kPairValues, bool kTwoNibbles>
struct BlockOrder {
  using Element = T;
  static constexpr int kPair = kPairValues;
  static constexpr bool kNibbles = kTwoNibbles;
  // Element (byte, for int4) of value `reduced` in column `column` of `num_columns`: the columns are the block's 16
  // tokens for K, head_dim for V.
  static int64_t index(int64_t reduced, int64_t column, int64_t num_columns) {
    constexpr int kSpan = kNibbles ? 2 * kPair : kPair;
    return reduced / kSpan * (kPair * num_columns) + column * kPair + reduced % kPair;
  }
  // Bit of that byte at which the value begins.
  static int shift(int64_t reduced) { return kNibbles && reduced / kPair % 2 != 0 ? 4 : 0; }
  static constexpr int64_t bytes(int64_t num_values) { return num_values * int64_t(sizeof(T)) / (kNibbles ? 2 : 1); }

  static void put(T* block, int64_t reduced, int64_t column, int64_t num_columns, T value) {
    T* at = block + index(reduced, column, num_columns);
    if constexpr (kNibbles) {
      value = T((*at & (0xf0 >> shift(reduced))) | (value << shift(reduced)));
    }
    *at = value;
  }
  // Writes one token's values of K, column `column` of a block: whole lanes.
  static void put_column(T* block, int64_t column, const T* row, int64_t head_dim) {
    if constexpr (kNibbles) {
      for (int64_t d = 0; d < head_dim; d += 2 * kPair) {
        T lane[kPair];
        for (int i = 0; i < kPair; ++i) lane[i] = T(row[d + i] | row[d + kPair + i] << 4);
        std::memcpy(block + index(d, column, kKvBlockTokens), lane, sizeof(lane));
      }
    } else {
      for (int64_t d = 0; d < head_dim; d += kPair) {
        std::memcpy(block + index(d, column, kKvBlockTokens), row + d, kPair * sizeof(T));
      }
    }
  }
  // Writes one token's values of V: a part of each 32-bit lane. The lane's other tokens are rewritten as they were, so that
  // nobody else may write the block meanwhile.
  static void put_row(T* block, int64_t token, const T* row, int64_t head_dim) {
    T* at = block + index(token - token % kPair, 0, head_dim);
    if constexpr (kPair == 1) {
      std::memcpy(at, row, sizeof(T) * head_dim);
    } else {
      constexpr int kBits = kNibbles ? 4 : 8 * int(sizeof(T));
      const int up = int(token % kPair) * 8 * int(sizeof(T)) + shift(token);
      const uint32_t keep = ~(((1u << kBits) - 1) << up);
      for (int64_t d = 0; d < head_dim; ++d) {
        uint32_t lane;
        std::memcpy(&lane, at + d * kPair, 4);
        lane = (lane & keep) | uint32_t(row[d]) << up;
        std::memcpy(at + d * kPair, &lane, 4);
      }
    }
  }
  static T get(const T* block, int64_t reduced, int64_t column, int64_t num_columns) {
    const T value = block[index(reduced, column, num_columns)];
    if constexpr (kNibbles) return T((value >> shift(reduced)) & 0x0f);
    return value;
  }
  // Value d of a row stored in plain order (int4: low nibble = even d).
  static T get_plain(const T* row, int64_t d) {
    if constexpr (kNibbles) return T((row[d / 2] >> (d % 2 * 4)) & 0x0f);
    return row[d];
  }
};

// One side (K or V) of one page and kv head.
struct KvSide {
  char* cache;
  int64_t page_stride, head_stride, token_stride;  // in Order::Element
  int32_t head_dim;
  bool is_k, blocked;
};

// Row `offset` of a page, as head_dim stored values (int4: one value per byte).
template <class Order>
inline void read_kv_row(const KvSide& side, int64_t page, int64_t head, int64_t offset, typename Order::Element* row) {
  using T = typename Order::Element;
  const T* at = reinterpret_cast<const T*>(side.cache) + page * side.page_stride + head * side.head_stride;
  if (!side.blocked) {
    at += offset * side.token_stride;
    for (int d = 0; d < side.head_dim; ++d) row[d] = Order::get_plain(at, d);
    return;
  }
  const int64_t t = offset % kKvBlockTokens;
  at += (offset - t) * Order::bytes(side.head_dim) / int64_t(sizeof(T));
  for (int d = 0; d < side.head_dim; ++d) {
    row[d] = side.is_k ? Order::get(at, d, t, kKvBlockTokens) : Order::get(at, t, d, side.head_dim);
  }
}

template <class Order>
inline void write_kv_row(const KvSide& side, int64_t page, int64_t head, int64_t offset, const typename Order::Element* row) {
  using T = typename Order::Element;
  T* at = reinterpret_cast<T*>(side.cache) + page * side.page_stride + head * side.head_stride;
  if (!side.blocked) {
    at += offset * side.token_stride;
    if constexpr (Order::kNibbles) {
      for (int d = 0; d < side.head_dim; d += 2) at[d / 2] = T(row[d] | row[d + 1] << 4);
    } else {
      std::memcpy(at, row, sizeof(T) * side.head_dim);
    }
    return;
  }
  const int64_t t = offset % kKvBlockTokens;
  at += (offset - t) * Order::bytes(side.head_dim) / int64_t(sizeof(T));
  if (side.is_k) {
    Order::put_column(at, t, row, side.head_dim);
  } else {
    Order::put_row(at, t, row, side.head_dim);
  }
}

template <class Params>
inline KvSide k_side(const Params& p) {
  return {static_cast<char*>(const_cast<void*>(p.k_cache)), p.k_page_stride, p.k_head_stride, p.k_token_stride,
          p.head_dim_qk, true, p.kv_layout == KvLayout::kBlocked};
}
template <class Params>
inline KvSide v_side(const Params& p) {
  return {static_cast<char*>(const_cast<void*>(p.v_cache)), p.v_page_stride, p.v_head_stride, p.v_token_stride,
          p.head_dim_vo, false, p.kv_layout == KvLayout::kBlocked};
}

// Index of a token's (scale, zero) pair in kv_scales: [num_pages, 2, num_kv_heads, page_size, 2] float16.
inline int64_t kv_scale_index(const KvSide& side, int64_t page, int64_t head, int64_t offset, int64_t num_kv_heads,
                              int64_t page_size) {
  return (((page * 2 + (side.is_k ? 0 : 1)) * num_kv_heads + head) * page_size + offset) * 2;
}

using Float32Order = BlockOrder<float, 1, false>;
using Float16Order = BlockOrder<uint16_t, 1, false>;
using BFloat16Order = BlockOrder<uint16_t, 2, false>;
struct Float8Order : BlockOrder<uint8_t, 4, false> {};  // e4m3
using Int8Order = BlockOrder<uint8_t, 4, false>;
using Int4Order = BlockOrder<uint8_t, 4, true>;
template <class Order>
constexpr bool kHasScales = std::is_same_v<Order, Int8Order> || std::is_same_v<Order, Int4Order>;

// f(Order{}) for a cache of `dtype`.
template <class Fn>
inline void with_block_order(KvDType dtype, Fn&& f) {
  switch (dtype) {
    case DType::kFloat16: return f(Float16Order{});
    case DType::kBFloat16: return f(BFloat16Order{});
    case DType::kFloat8E4M3: return f(Float8Order{});
    case DType::kUInt8: return f(Int8Order{});
    case DType::kUInt4: return f(Int4Order{});
    default: return f(Float32Order{});
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
