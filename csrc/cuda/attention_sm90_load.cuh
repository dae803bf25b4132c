// The Hopper attention's loading warps: TMA brings K and V page by page; pages outside a job come as zeros.
#pragma once

#include "cuda/attention_sm90_config.cuh"

namespace tilestream::cuda {

// Host. A side of the cache, 0 for K, 1 for V, in bytes; a box has row_bytes of each token of a page. Columns past the cache's
// own are zeros.
inline ptx::TensorMap kv_map(const AttentionParams& p, int side, uint32_t row_bytes, ptx::Swizzle swizzle) {
  const uint64_t unit = p.kv_dtype == DType::kUInt4 ? 1 : dtype_bytes(p.kv_dtype, 1), page_size = uint64_t(p.page_size);
  const auto [page, head, token] = side == 0 ? std::array{p.k_page_stride, p.k_head_stride, p.k_token_stride}
                                             : std::array{p.v_page_stride, p.v_head_stride, p.v_token_stride};
  return ptx::make_tensor_map(side == 0 ? p.k_cache : p.v_cache, 1,
                              {{uint64_t(dtype_bytes(p.kv_dtype, side == 0 ? p.head_dim_qk : p.head_dim_vo)), 1, row_bytes},
                               {page_size, uint64_t(token) * unit, uint32_t(page_size)},
                               {uint64_t(p.num_kv_heads), uint64_t(head) * unit, 1},
                               {uint64_t(p.num_pages), uint64_t(page) * unit, 1}},
                              swizzle);
}

// One warp: kPanels panels of `num_keys` keys from key `tile` on, kRowBytes a key and panel, to `dst`; completes on `full`.
// A page outside the job is not looked up: one past the last of the tensor gives zeros.
template <int kPanels, int kRowBytes = kPanelRowBytes>
__device__ __forceinline__ void load_tile(const ptx::TensorMap& map, const AttentionParams& p, const Job& job, int tile,
                                          int num_keys, unsigned char* dst, uint64_t* full) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, kPanels * num_keys * kRowBytes);
  __syncwarp();
  const int num_boxes = kPanels * (num_keys >> job.page_shift);
#pragma unroll 1  // a map takes uniform registers, so lanes go one by one in any case
  for (int box = lane; box < num_boxes; box += kWarpSize) {
    const int panel = box % kPanels, first = box / kPanels << job.page_shift, key = tile + first;
    const bool is_mine = key + job.page_size > job.at.kv_begin && key < job.at.kv_end;
    const int page = is_mine ? int(job.page(key)) : p.num_pages;
    ptx::cp_async_bulk_tensor_load(dst + (panel * num_keys + first) * kRowBytes, map,
                                   {panel * kRowBytes, 0, job.at.kv_head, page}, full);
  }
}

// The warp that brings the wide lane's tiles.
template <class C>
__device__ __forceinline__ void load_wide(const AttentionParams& p, const KvMaps& maps, WideStorage<C>& s) {
  RingPosition<C::kStages> at;
  // Without a narrow lane, all jobs.
  publish_jobs(p, s.jobs, 0, C::kNarrow ? p.num_wide_lists : p.num_lists, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = at.stage();
      ptx::mbarrier_wait_parity(&s.k_empty[stage], at.empty_parity());
      load_tile<C::kPanelsQk>(maps.k, p, job, tile, C::kKeys, s.k[stage], &s.k_full[stage]);
      ptx::mbarrier_wait_parity(&s.v_empty[stage], at.empty_parity());
      uint64_t* const full = has_foreign_keys<C>(job, tile) ? s.v_landed : s.v_full;
      load_tile<C::kPanelsVo>(maps.v, p, job, tile, C::kKeys, s.v[stage], &full[stage]);
      at.advance();
    });
  });
}

// One warp: zeros in the rows of a V tile from `first` to `end`, for the tensor cores to read. What lies there may be NaN, and
// its weight of 0 would not undo that.
template <int kPanels>
__device__ __forceinline__ void zero_rows(unsigned char* tile, int num_keys, int first, int end) {
  const int chunks = (end - first) * kPanelRowBytes / 16;
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    auto* const rows = reinterpret_cast<uint4*>(tile + (panel * num_keys + first) * kPanelRowBytes);
    for (int i = threadIdx.x % kWarpSize; i < chunks; i += kWarpSize) rows[i] = {};
  }
  ptx::fence_proxy_async();
  __syncwarp();
}

// The warp that repairs the wide lane's V tiles: those whose last page is not all the job's.
template <class C>
__device__ __forceinline__ void repair_wide(WideStorage<C>& s) {
  RingPosition<C::kStages> at;
  unsigned parities = 0;  // of v_landed, by stage
  read_jobs(s.jobs, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = at.stage();
      if (has_foreign_keys<C>(job, tile)) {
        ptx::mbarrier_wait_parity(&s.v_landed[stage], parities >> stage & 1);
        parities ^= 1u << stage;
        const int first = job.at.kv_end - tile, end = first + job.page_size - job.offset(job.at.kv_end);
        zero_rows<C::kPanelsVo>(s.v[stage], C::kKeys, first, end);
        if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&s.v_full[stage]);
      }
      at.advance();
    });
  });
}

}  // namespace tilestream::cuda
