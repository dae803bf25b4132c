// The tensor-core attention's tile sizes, its shared memory, and the words that its parts share.
#pragma once

#include "cuda/attention_job.cuh"
#include "cuda/common/kv_values.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

constexpr int kFragmentRows = 16;  // of mma m16n8k16

// T: element of the products, __half or __nv_bfloat16. kMaxDim: 64, 128 or 256, at least both head dims.
template <class T_, class KV_, int kMaxDim_>
struct MmaConfig {
  using T = T_;
  using KV = KV_;
  static constexpr int kMaxDim = kMaxDim_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr bool kQuantised = kKvBits<KV> <= 8, kHasScales = kIsQuantised<KV>;
  // Registers hold a warp's rows x columns of out and rows x keys of scores. Two row fragments use what a
  // warp reads of K and V twice. A cache that has to be unpacked is for decode: more keys between barriers,
  // and a third block on an SM.
  static constexpr int kFragments = kQuantised || kMaxDim > 128 ? 1 : 2;
  static constexpr int kRows = kFragmentRows * kWarps * kFragments;
  static constexpr int kTileKeys = kQuantised && kMaxDim <= 128 ? 64 : 32;
  static constexpr int kBlocksPerSm = kQuantised && kMaxDim <= 128 ? 3 : 2;
  // A copy: 16 values of 8 or 4 bits, 8 of 16 bits.
  static constexpr int kChunkValues = kQuantised ? 16 : 8, kChunkBytes = kChunkValues * kKvBits<KV> / 8;
  static constexpr int kChunksPerRow = kMaxDim / kChunkValues, kRowsPerPass = kThreads / kChunksPerRow;
  static constexpr int kPasses = kTileKeys / kRowsPerPass;
  static_assert(kTileKeys % kRowsPerPass == 0 && kThreads % kChunksPerRow == 0);
  // A piece is the K or the V of a tile as the cache stores it. All slots but one are under way.
  static constexpr int kPieceBytes = kTileKeys * kMaxDim * kKvBits<KV> / 8;
  static constexpr int kSlots = (kQuantised ? 24 : 48) * 1024 / kPieceBytes;
  static_assert(kSlots >= 3);
};

template <class C>
struct SharedStorage {
  // Row tiles whose rows the warps share (attention_rows.cuh) leave most of q's room to what they exchange.
  struct SharedRows {
    typename C::T q[kFragmentRows * C::kMaxDim];
    uint4 weights[C::kTileKeys / 16][kWarpSize];  // 16 keys' fragment a of the second product, by lane
    float maxima[C::kWarps][kFragmentRows];
  };
  struct Tiles {
    union {
      alignas(128) typename C::T q[C::kRows * C::kMaxDim];
      SharedRows shared;
    };
    alignas(128) unsigned char ring[C::kSlots][C::kPieceBytes];
    alignas(128) typename C::T unpacked[C::kQuantised ? C::kTileKeys * C::kMaxDim : 1];  // the current piece
    __half2 scales[C::kHasScales ? C::kSlots : 1][C::kTileKeys];
  };
  struct Rows {  // what a row tile gives in the end
    float out[C::kRows][C::kMaxDim + 8];  // 8: pairs of 4 rows lie in different banks
    float lse_log2[C::kRows];
  };
  union {
    Tiles tiles;
    Rows rows;
  };
  Job job;
};

// A tile's rows lie in 16-byte chunks, swizzled so that 8 rows at one chunk lie in 8 different bank groups.
template <int kMaxDim, class T>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int chunk) {
  return tile + row * kMaxDim + (chunk ^ (row & 7)) * 8;
}
// The same for ldmatrix, which reads 16 rows at a pair of chunks: where a lane's row lies in the first pair,
// in bytes, and the lane's address in the 16 rows from `row` on, at pair `pair`. One xor, so that few
// addresses have to be kept.
template <int kMaxDim>
__device__ __forceinline__ int matrix_row(int row, int chunk_of_pair) {
  return row * kMaxDim * 2 + (chunk_of_pair ^ (row & 7)) * 16;
}
template <int kMaxDim, class T>
__device__ __forceinline__ const void* chunks_at(const T* tile, int row, int lane_row, int pair) {
  return reinterpret_cast<const char*>(tile + row * kMaxDim) + (lane_row ^ pair * 32);
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, __half>) ptx::mma_m16n8k16_f16(d, a, b);
  else ptx::mma_m16n8k16_bf16(d, a, b);
}

}  // namespace tilestream::cuda
