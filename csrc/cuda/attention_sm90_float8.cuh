// The Hopper attention's loading warps for products of e4m3: K goes to the wide lane as TMA brings it, V through a ring of its
// own, because the tensor cores take 8-bit tiles along the reduced axis alone: two warps turn V's rows of columns into rows of
// keys. The keys of each 16 stand in the order in which a thread holds their weights (WideRows::pack).
#pragma once

#include "cuda/attention_sm90_load.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace tilestream::cuda {

// The warp that brings the wide lane's tiles.
template <class C>
__device__ __forceinline__ void load_float8(const AttentionParams& p, const KvMaps& maps, WideStorage<C>& s, RawStorage<C>& raw) {
  RingPosition<C::kStages> at;
  publish_jobs(p, s.jobs, 0, C::kNarrow ? p.num_wide_lists : p.num_lists, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = at.stage();
      ptx::mbarrier_wait_parity(&s.k_empty[stage], at.empty_parity());
      load_tile<C::kPanelsQk, C::kRowBytes>(maps.k, p, job, tile, C::kKeys, s.k[stage], &s.k_full[stage]);
      ptx::mbarrier_wait_parity(&raw.empty[stage], at.empty_parity());
      load_tile<C::kPanelsVo, C::kRowBytes>(maps.v, p, job, tile, C::kKeys, raw.v[stage], &raw.full[stage]);
      at.advance();
    });
  });
}

// 0xff for each of keys first, first + 1, first + 8 and first + 9 that is the job's.
__device__ __forceinline__ unsigned own_keys(const Job& job, int first) {
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = first + i % 2 + i / 2 * 8;
    if (key >= job.at.kv_begin && key < job.at.kv_end) mask |= 0xffu << 8 * i;
  }
  return mask;
}

// A warp's share of a V tile: 16 columns in turn with the others. Matrices of 16-bit elements are transposed as they are read:
// a lane then has pairs of columns of four keys, which prmt parts. Lanes of the upper rows store the two columns the other way
// round, for 8 rows of a store to lie in different banks. kWhole: all keys are the job's.
template <class C, bool kWhole>
__device__ __forceinline__ void transpose_tile(const Job& job, int tile, const unsigned char* raw, unsigned char* dst) {
  constexpr ptx::Swizzle kTurned = C::kKeys == 64 ? ptx::Swizzle::k64 : ptx::Swizzle::k128;
  static_assert(C::kKeys <= 128, "a column's keys are one row of the pattern");
  constexpr int kStride = 16 * kConvertWarps, kOfPanel = C::kRowBytes / kStride;  // columns; shares of the warp in a panel
  // opaque: what follows from it would otherwise be kept in registers from tile to tile
  const unsigned thread = ptx::opaque(threadIdx.x), lane = thread % kWarpSize, matrix = lane / 8, row = lane % 8;
  const unsigned first_column = (thread / kWarpSize - kConvertWide) * 16,
                 column = first_column + 2 * row + (matrix % 2 ^ row / 4);
  const unsigned first = lane < 16 ? 0x6420 : 0x7531, second = first ^ 0x1111;  // bytes of the column that is stored first
  unsigned from[kOfPanel];
#pragma unroll
  for (int i = 0; i < kOfPanel; ++i) from[i] = ptx::swizzled(C::kSwizzle, lane * C::kRowBytes + first_column + i * kStride);
#pragma unroll
  for (int key = 0; key < C::kKeys; key += 32) {
    unsigned char* const to = dst + ptx::swizzled(kTurned, column * C::kKeys + key + matrix / 2 * 16);
    unsigned low = ~0u, high = ~0u;
    if constexpr (!kWhole)
      low = own_keys(job, tile + key + 2 * (lane % 4)), high = own_keys(job, tile + key + 16 + 2 * (lane % 4));
#pragma unroll
    for (int panel = 0; panel < C::kPanelsVo; ++panel) {
      unsigned pairs[kOfPanel][4];
#pragma unroll
      for (int i = 0; i < kOfPanel; ++i)
        ptx::ldmatrix_x4_trans(pairs[i], raw + panel * C::kPanelBytes + key * C::kRowBytes + from[i]);
#pragma unroll
      for (int i = 0; i < kOfPanel; ++i) {
        const unsigned(&p)[4] = pairs[i];
        const unsigned keys[4] = {ptx::prmt(p[0], p[1], first) & low, ptx::prmt(p[0], p[1], second) & low,
                                  ptx::prmt(p[2], p[3], first) & high, ptx::prmt(p[2], p[3], second) & high};
        ptx::stmatrix_x4(to + (panel * C::kRowBytes + i * kStride) * C::kKeys, keys);
      }
    }
  }
}

// The warps that turn the wide lane's V tiles.
template <class C>
__device__ __forceinline__ void transpose_wide(WideStorage<C>& s, RawStorage<C>& raw) {
  RingPosition<C::kStages> at;
  read_jobs(s.jobs, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = at.stage();
      ptx::mbarrier_wait_parity(&raw.full[stage], at.full_parity());
      ptx::mbarrier_wait_parity(&s.v_empty[stage], at.empty_parity());
      if (tile >= job.at.kv_begin && tile + C::kKeys <= job.at.kv_end)
        transpose_tile<C, true>(job, tile, raw.v[stage], s.v[stage]);
      else transpose_tile<C, false>(job, tile, raw.v[stage], s.v[stage]);
      ptx::fence_proxy_async();
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&raw.empty[stage]), ptx::mbarrier_arrive(&s.v_full[stage]);
      at.advance();
    });
  });
}

}  // namespace tilestream::cuda
