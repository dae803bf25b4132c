// The tiles of K and V on their way from the cache to shared memory: a ring of pieces (a tile's K, its V, the
// next tile's K, ...), which cp.async fills while earlier ones are used. One barrier a piece, two where it
// has to be unpacked.
#pragma once

#include "cuda/attention_config.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace tilestream::cuda {

template <class C>
class KvPipe {
 public:
  using T = typename C::T;

  // Starts to copy the tiles from tile_begin on. All threads take part, here and in next().
  __device__ __forceinline__ KvPipe(const AttentionParams& p, const Job& job, int tile_begin, int tiles_end,
                                    typename SharedStorage<C>::Tiles& smem)
      : p_(p),
        job_(job),
        smem_(smem),
        chunk_(ptx::opaque(threadIdx.x) % C::kChunksPerRow),
        row_(ptx::opaque(threadIdx.x) / C::kChunksPerRow),
        copy_tile_(tile_begin),
        tiles_end_(tiles_end) {
#pragma unroll
    for (int slot = 0; slot < C::kSlots - 1; ++slot) {
      if (slot % 2 == 0) copy<0>(slot);
      else copy<1>(slot);
    }
  }

  // The next piece, K (side 0) and V (side 1) in turn, as T in the swizzled order of chunk_at, until the call
  // after.
  template <int kSide>
  __device__ __forceinline__ T* next() {
    const int slot = slot_;
    slot_ = slot + 1 == C::kSlots ? 0 : slot + 1;
    ptx::cp_async_wait_group<C::kSlots - 2>();
    __syncthreads();  // the copies of all threads have landed, and nobody uses the piece before any more
    copy<(kSide + C::kSlots - 1) % 2>(slot == 0 ? C::kSlots - 1 : slot - 1);
    if constexpr (C::kQuantised) {
      unpack<kSide>(slot);
      __syncthreads();
      return smem_.unpacked;
    } else {
      return reinterpret_cast<T*>(smem_.ring[slot]);
    }
  }

 private:
  __device__ __forceinline__ bool has_chunk(int side) const {
    return chunk_ * C::kChunkValues < (side == 0 ? p_.head_dim_qk : p_.head_dim_vo);
  }

  // Starts the copies of the next piece; past the last an empty group, so that groups count pieces. Keys
  // outside the job become zeros: their weight is 0, but what lies there may be NaN. Their page is not looked
  // up.
  template <int kSide>
  __device__ __forceinline__ void copy(int slot) {
    if (copy_tile_ < tiles_end_) {
      const KvRows side =
          kv_rows<typename C::KV>(p_, kSide, job_.at.kv_head, job_.num_kv_heads, job_.page_size);
#pragma unroll 2  // all at once, addresses would take the registers that out and the scores need
      for (int pass = 0; pass < C::kPasses; ++pass) {
        const int row = pass * C::kRowsPerPass + row_, key = copy_tile_ + row;
        const bool is_mine = key >= job_.at.kv_begin && key < job_.at.kv_end;
        const int64_t page = is_mine ? job_.page(key) : 0;
        const int offset = is_mine ? job_.offset(key) : 0;
        if (has_chunk(kSide)) {
          const char* from = side.row(page, offset) + chunk_ * C::kChunkBytes;
          ptx::cp_async<C::kChunkBytes>(chunk(slot, row), from, is_mine ? C::kChunkBytes : 0);
        }
        if constexpr (C::kHasScales) {
          if (chunk_ == 0)
            ptx::cp_async<4>(&smem_.scales[slot][row], side.scale(page, offset), is_mine ? 4 : 0);
        }
      }
    }
    ptx::cp_async_commit_group();
    if (kSide == 1) copy_tile_ += C::kTileKeys;
  }

  // This thread's chunk of a row in the ring. Packed ones are read as they were written: by row and chunk.
  __device__ __forceinline__ void* chunk(int slot, int row) const {
    if constexpr (C::kQuantised) return smem_.ring[slot] + (row * C::kChunksPerRow + chunk_) * C::kChunkBytes;
    else return chunk_at<C::kMaxDim>(reinterpret_cast<T*>(smem_.ring[slot]), row, chunk_);
  }

  // Chunks 4 apart would lie in the same banks of the tile: a thread begins with its first half or its second.
  template <int kSide>
  __device__ __forceinline__ void unpack(int slot) const {
    using Words = std::conditional_t<C::kChunkBytes == 16, uint4, uint2>;
    constexpr int kHalfWords = C::kChunkBytes / 8;
    if (!has_chunk(kSide)) return;
    const int first_half = chunk_ / 4 % 2;
#pragma unroll
    for (int pass = 0; pass < C::kPasses; ++pass) {
      const int row = pass * C::kRowsPerPass + row_;
      float2 scale{};
      if constexpr (C::kHasScales) scale = __half22float2(smem_.scales[slot][row]);
      const Words words = *static_cast<const Words*>(chunk(slot, row));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned* halves = reinterpret_cast<const unsigned*>(&words);
        unsigned from[kHalfWords];
#pragma unroll
        for (int w = 0; w < kHalfWords; ++w) from[w] = first_half == i ? halves[w] : halves[kHalfWords + w];
        T* const to = chunk_at<C::kMaxDim>(smem_.unpacked, row, chunk_ * 2 + (first_half ^ i));
        if constexpr (C::kHasScales) *reinterpret_cast<Vec<T>*>(to) = kv_values<typename C::KV, T>(from, scale);
        else *reinterpret_cast<Vec<T>*>(to) = e4m3_values<T>(from);
      }
    }
  }

  const AttentionParams& p_;
  const Job& job_;
  typename SharedStorage<C>::Tiles& smem_;
  const int chunk_, row_;  // which this thread copies, in each pass
  int copy_tile_;          // the next to copy
  const int tiles_end_;
  int slot_ = 0;           // of the next piece
};

}  // namespace tilestream::cuda
