// Finds a tile's blocks through the page table. Strided pages are packed into the blocked order, and V of tokens
// outside the job is zeroed in a copy (its weight is 0, but the memory may hold NaN); all else is read in place.
#pragma once

#include "cpu/attention_digits.h"
#include "cpu/attention_tile.h"
#include "tilestream/attention.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

template <class Order>
void pack_k_block(const char* rows, int64_t row_bytes, int head_dim, char* block) {
  using T = typename Order::Element;
  T* out = reinterpret_cast<T*>(block);
  if constexpr (Order::kNibbles) {
    for (int t = 0; t < kKvBlockTokens; ++t) {
      const T* row = reinterpret_cast<const T*>(rows + t * row_bytes);
      for (int d = 0; d < head_dim; ++d) Order::put(out, d, t, kKvBlockTokens, Order::get_plain(row, d));
    }
  } else {
    constexpr int kUnitBytes = Order::kPair * int(sizeof(T));
    for (int u = 0; u < head_dim / Order::kPair; ++u) {
      for (int t = 0; t < kKvBlockTokens; ++t) {
        std::memcpy(block + (u * kKvBlockTokens + t) * kUnitBytes, rows + t * row_bytes + u * kUnitBytes, kUnitBytes);
      }
    }
  }
}

template <class Order>
void pack_v_block(const char* rows, int64_t row_bytes, int head_dim, char* block) {
  using T = typename Order::Element;
  T* out = reinterpret_cast<T*>(block);
  const auto row = [&](int t) { return reinterpret_cast<const T*>(rows + t * row_bytes); };
  if constexpr (Order::kNibbles) {
    for (int t = 0; t < kKvBlockTokens; ++t) {
      for (int d = 0; d < head_dim; ++d) Order::put(out, t, d, head_dim, Order::get_plain(row(t), d));
    }
  } else if constexpr (Order::kPair == 1) {
    for (int t = 0; t < kKvBlockTokens; ++t) std::memcpy(out + t * head_dim, row(t), head_dim * sizeof(T));
  } else {
    for (int t = 0; t < kKvBlockTokens; t += Order::kPair, out += Order::kPair * head_dim) {
      for (int d = 0; d < head_dim; ++d) {
        for (int i = 0; i < Order::kPair; ++i) out[d * Order::kPair + i] = row(t + i)[d];
      }
    }
  }
}

// Zeroes V of the block's tokens outside begin .. end.
template <class Order>
void clear_v_tokens(char* block, int begin, int end, int head_dim) {
  using T = typename Order::Element;
  T* out = reinterpret_cast<T*>(block);
  for (int t = 0; t < kKvBlockTokens; t += Order::kPair, out += Order::kPair * head_dim) {
    if (t >= end || t + Order::kPair <= begin) {
      std::memset(out, 0, sizeof(T) * Order::kPair * head_dim);
      continue;
    }
    for (int i = 0; i < Order::kPair; ++i) {
      if (t + i >= begin && t + i < end) continue;
      for (int d = 0; d < head_dim; ++d) out[d * Order::kPair + i] = T(0);
    }
  }
}

// One job's view of the cache.
template <class C>
class TileReader {
 public:
  // pack: room for one tile of K and V blocks, kTileBlocks * block_bytes() bytes.
  TileReader(const AttentionParams& p, const PlanJob& job, char* pack)
      : p_(p),
        job_(job),
        table_(p.block_table + job.page_list * p.block_table_stride),
        pack_(pack),
        strided_(p.kv_layout == KvLayout::kStrided),
        k_(side(p.k_cache, p.k_page_stride, p.k_head_stride, p.k_token_stride, p.head_dim_qk)),
        v_(side(p.v_cache, p.v_page_stride, p.v_head_stride, p.v_token_stride, p.head_dim_vo)) {
    const int page_size = p.plan.header().page_size;
    while ((1 << page_shift_) < page_size) ++page_shift_;
  }

  static int64_t block_bytes(const AttentionParams& p) {
    return C::bytes(kKvBlockTokens * int64_t(p.head_dim_qk + p.head_dim_vo));
  }

  // Blocks of the tile that hold keys of the job.
  int block_begin(int tile_begin) const { return at_least_0(job_.kv_begin - tile_begin) / kKvBlockTokens; }
  int block_end(int tile_begin) const {
    const int keys = job_.kv_end - tile_begin;
    return keys >= kTileKeys ? kTileBlocks : (keys + kKvBlockTokens - 1) / kKvBlockTokens;
  }

  // Pointers into the cache; of strided pages only the place of the block's first token. Scales are prefetched.
  void locate(int tile_begin, TileBlocks& tile) const {
    for (int b = block_begin(tile_begin); b < block_end(tile_begin); ++b) {
      const int key = tile_begin + b * kKvBlockTokens;
      const int64_t page = table_[key >> page_shift_];
      const int64_t offset = key & ((1 << page_shift_) - 1);
      tile.k[b] = k_.begin + page * k_.page_bytes + offset * k_.token_bytes;
      tile.v[b] = v_.begin + page * v_.page_bytes + offset * v_.token_bytes;
      if constexpr (C::kQuantised) {
        tile.k_scales[b] = scales_of(k_side(p_), page, offset);
        tile.v_scales[b] = scales_of(v_side(p_), page, offset);
        prefetch(tile.k_scales[b]);
        prefetch(tile.v_scales[b]);
      }
    }
  }

  // Makes a located tile ready for the products.
  void prepare(int tile_begin, TileBlocks& tile) const {
    const bool clear = !C::kQuantised && !is_whole(tile_begin);  // quantised: the scales are 0
    if (!strided_ && !clear) return;
    for (int b = block_begin(tile_begin); b < block_end(tile_begin); ++b) {
      char* k = pack_ + b * block_bytes(p_);
      char* v = k + C::bytes(kKvBlockTokens * int64_t(p_.head_dim_qk));
      if (strided_) {
        pack_k_block<C>(tile.k[b], k_.token_bytes, p_.head_dim_qk, k);
        pack_v_block<C>(tile.v[b], v_.token_bytes, p_.head_dim_vo, v);
        tile.k[b] = k, tile.v[b] = v;
      }
      const int key = tile_begin + b * kKvBlockTokens, begin = job_.kv_begin - key, end = job_.kv_end - key;
      if (clear && (begin > 0 || end < kKvBlockTokens)) {
        if (!strided_) std::memcpy(v, tile.v[b], C::bytes(kKvBlockTokens * int64_t(p_.head_dim_vo)));
        clear_v_tokens<C>(v, begin, end, p_.head_dim_vo);
        tile.v[b] = v;
      }
    }
  }

  void read_scales(int tile_begin, const TileBlocks& tile, TileScales& scales) const {
    if (!is_whole(tile_begin)) std::memset(&scales, 0, sizeof(scales));
    for (int b = block_begin(tile_begin); b < block_end(tile_begin); ++b) {
      const int key = tile_begin + b * kKvBlockTokens;
      F32x16 k_scale, k_zero, v_scale, v_zero;
      load_f16_pairs(tile.k_scales[b], k_scale, k_zero);
      load_f16_pairs(tile.v_scales[b], v_scale, v_zero);
      k_zero = fma(k_scale, set1(float(C::kCentre)), k_zero);
      v_zero = fma(v_scale, set1(float(C::kCentre)), v_zero);
      const int begin = job_.kv_begin - key, end = job_.kv_end - key;
      if (begin > 0 || end < kKvBlockTokens) v_scale = keep(v_scale, begin, end), v_zero = keep(v_zero, begin, end);
      store(scales.k_scale + 16 * b, k_scale);
      store(scales.k_zero + 16 * b, k_zero);
      store(scales.v_scale + 16 * b, v_scale);
      store(scales.v_zero + 16 * b, v_zero);
    }
  }

 private:
  bool is_whole(int tile_begin) const { return job_.kv_begin <= tile_begin && job_.kv_end >= tile_begin + kTileKeys; }

  // The job's kv head in one side of the cache.
  struct Side {
    const char* begin;
    int64_t page_bytes, token_bytes;
  };
  Side side(const void* cache, int64_t page_stride, int64_t head_stride, int64_t token_stride, int head_dim) const {
    constexpr int64_t kBytes = sizeof(typename C::Element);
    return {static_cast<const char*>(cache) + job_.kv_head * head_stride * kBytes, page_stride * kBytes,
            strided_ ? token_stride * kBytes : C::bytes(head_dim)};
  }
  const uint16_t* scales_of(const KvSide& side, int64_t page, int64_t offset) const {
    return static_cast<const uint16_t*>(p_.kv_scales) +
           kv_scale_index(side, page, job_.kv_head, offset, p_.plan.header().num_kv_heads, 1 << page_shift_);
  }
  static int at_least_0(int x) { return x > 0 ? x : 0; }
  // Lanes begin .. end of x, 0 elsewhere.
  static F32x16 keep(F32x16 x, int begin, int end) {
    const I32x16 lanes = iota();
    return where_lt(lanes, begin, zero(), where_lt(lanes, end, x, zero()));
  }

  const AttentionParams& p_;
  const PlanJob& job_;
  const int32_t* table_;
  char* pack_;
  bool strided_;
  Side k_, v_;
  int page_shift_ = 0;
};

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
