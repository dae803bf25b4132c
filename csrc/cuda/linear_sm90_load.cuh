// The Hopper linears' first warpgroup: what brings weights, rows and scales to shared memory, and widens INT4.
#pragma once

#include "cuda/linear_sm90_config.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace tilestream::cuda {

// Host. Boxes of one group of kTokens rows; rows past the last and k past the end come as zeros.
template <class C>
LinearMaps linear_maps(const LinearParams& p) {
  const uint64_t row_bytes = p.x_q.row_bytes(p.k), bytes4 = p.x_q.k4 / 2, bytes8 = row_bytes - bytes4;
  const auto map = [&](uint64_t begin, uint64_t size, uint32_t box, ptx::Swizzle swizzle) {
    // Of no elements: a map all the same, which nobody uses.
    return size == 0
               ? ptx::TensorMap{}
               : ptx::make_tensor_map(p.x_q.q + begin, 1, {{size, 1, box}, {uint64_t(p.m), row_bytes, C::kTokens}}, swizzle);
  };
  return {.x = map(bytes4, bytes8, kRowBytes8, ptx::Swizzle::k128), .x4 = map(0, bytes4, kRowBytes4, ptx::Swizzle::kNone)};
}

// One thread: weights, and rows as they are. A panel past the last is the last again, and its sums not stored.
template <class C>
__device__ __forceinline__ void load_tiles(const LinearParams& p, const LinearWork<C>& work, const LinearMaps& maps,
                                           LinearSm90Storage<C>& s) {
  using Layout = typename C::Layout;
  const int last_panel = int(ceil_div(p.n, kPanelColumns)) - 1;
  const int64_t panel_stride = panel_bytes(C::kFormat, p.k);
  work.for_each_step([&](int tile, int group, const auto& ring) {
    const int stage = ring.stage, row = work.first_row(tile);
    const unsigned piece_bytes = Layout::parts(p.k, group) * Layout::kCodeBytes + (Layout::kBytes - Layout::kScaleAt);
    uint64_t* const full = &s.full[stage];
    ptx::mbarrier_wait_parity(&s.empty[stage], ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, C::kPanels * piece_bytes);
    const auto* const weight = static_cast<const unsigned char*>(p.weight) + int64_t(group) * Layout::kBytes;
    for (int i = 0; i < C::kPanels; ++i) {
      const int panel = min(work.first_column(tile) / kPanelColumns + i, last_panel);
      ptx::cp_async_bulk_load(s.weight[stage][i], weight + panel * panel_stride, piece_bytes, full);
    }
    if (group < work.num_groups4) {
      ptx::mbarrier_arrive_expect_tx(&s.landed[stage], sizeof s.x4[0]);
      ptx::cp_async_bulk_tensor_load(s.x4[stage], maps.x4, {group * int(kRowBytes4), row}, &s.landed[stage]);
    } else {
      ptx::mbarrier_arrive_expect_tx(full, sizeof s.x[0]);
      ptx::cp_async_bulk_tensor_load(s.x[stage], maps.x, {(group - work.num_groups4) * int(kRowBytes8), row}, full);
    }
  });
}

// One warp: the rows' scales and sums, which lie too far apart for the copy engine.
template <class C>
__device__ __forceinline__ void load_scales(const LinearParams& p, const LinearWork<C>& work, LinearSm90Storage<C>& s) {
  const int lane = threadIdx.x % kWarpSize;
  work.for_each_step([&](int tile, int group, const auto& ring) {
    const int stage = ring.stage;
    ptx::mbarrier_wait_parity(&s.empty[stage], ring.parity ^ 1);
    for (int i = lane; i < C::kTokens; i += kWarpSize) {
      const int64_t row = work.first_row(tile) + i;
      const float* from = p.x_q.scale + row * work.num_groups + group;
      ptx::cp_async<4>(&s.scale[stage][i], row < p.m ? from : p.x_q.scale, row < p.m ? 4 : 0);
    }
    for (int i = lane; i < C::kTokens * C::kSums; i += kWarpSize) {
      const int64_t row = work.first_row(tile) + i / 4, part = int64_t(group) * 4 + i % 4, parts = p.k / kGroupK;
      const bool is_inside = row < p.m && part < parts;
      const int32_t* from = p.x_q.sum + row * parts + part;
      ptx::cp_async<4>(&s.sum[stage][i / 4][i % 4], is_inside ? from : p.x_q.sum, is_inside ? 4 : 0);
    }
    ptx::cp_async_mbarrier_arrive_noinc(&s.full[stage]);
  });
}

// Warps that take turns: INT4 groups to int8 of 16 times the value, in the order of the swizzle.
template <class C>
__device__ __forceinline__ void widen_rows(const LinearWork<C>& work, LinearSm90Storage<C>& s, int widener) {
  const int lane = threadIdx.x % kWarpSize;
  constexpr unsigned kHigh = 0xf0f0f0f0u;
  unsigned parities = 0;  // of `landed`, by stage
  work.for_each_step([&](int, int group, const auto& ring) {
    const int stage = ring.stage;
    if (group >= work.num_groups4) return;
    const unsigned parity = parities >> stage & 1;
    parities ^= 1u << stage;
    if (group % kWidenWarps != widener) return;
    ptx::mbarrier_wait_parity(&s.landed[stage], parity);
#pragma unroll 1  // few registers
    for (int i = lane; i < C::kTokens * 4; i += kWarpSize) {
      const uint4 v = *reinterpret_cast<const uint4*>(s.x4[stage] + 16 * i);
      const unsigned at = i / 4 * kRowBytes8 + i % 4 * 32;
      const auto place = [&](unsigned byte) {
        return reinterpret_cast<uint4*>(s.x[stage] + ptx::swizzled(ptx::Swizzle::k128, byte));
      };
      *place(at) = make_uint4(v.x << 4 & kHigh, v.y << 4 & kHigh, v.z << 4 & kHigh, v.w << 4 & kHigh);
      *place(at + 16) = make_uint4(v.x & kHigh, v.y & kHigh, v.z & kHigh, v.w & kHigh);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.full[stage]);
  });
}

}  // namespace tilestream::cuda
