// The Hopper attention's loading warps over caches of 8 and 4 bits: TMA brings a tile as the cache has it into a ring of its
// own, and two warps make it the 16-bit tile that the wide lane multiplies. Scale and zero are applied value by value, keys
// outside the job become zeros.
//
// Banks: four lanes read 16 values each, 64 columns of a row; eight rows of a warp's turn lie in as many rows of the swizzle.
// Neighbouring rows write chunks of different parity, and read panels that lie in different banks.
#pragma once

#include "cuda/attention_sm90_load.cuh"
#include "cuda/common/kv_values.cuh"
#include "cuda/ptx/bulk.cuh"

namespace tilestream::cuda {

// One warp: the job's pages of a tile's K (side 0) or V (side 1), and their scales; completes on `full`.
template <class C>
__device__ __forceinline__ void load_raw_tile(const ptx::TensorMap& map, const AttentionParams& p, const Job& job, int tile,
                                              int side, typename RawStorage<C>::Side& raw, int stage) {
  constexpr int kScaleBytes = C::kHasScales ? sizeof(__half2) : 0;
  const int lane = threadIdx.x % kWarpSize, first = lane << job.page_shift, key = tile + first;
  const bool is_mine = first < C::kKeys && key + job.page_size > job.at.kv_begin && key < job.at.kv_end;
  const int num_pages = __popc(__ballot_sync(kFullMask, is_mine));
  uint64_t* const full = &raw.full[stage];
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, num_pages * job.page_size * (C::kRawRowBytes + kScaleBytes));
  __syncwarp();
  if (!is_mine) return;
  const int page = int(job.page(key));
  ptx::cp_async_bulk_tensor_load(raw.rows[stage] + first * C::kRawRowBytes, map, {0, 0, job.at.kv_head, page}, full);
  if constexpr (C::kHasScales) {
    const KvRows rows = kv_rows<typename C::KV>(p, side, job.at.kv_head, job.num_kv_heads, job.page_size);
    ptx::cp_async_bulk_load(raw.scales[stage] + first, rows.scale(page, 0), job.page_size * kScaleBytes, full);
  }
}

// The warp that brings the wide lane's tiles.
template <class C>
__device__ __forceinline__ void load_raw(const AttentionParams& p, const KvMaps& maps, WideStorage<C>& s, RawStorage<C>& raw) {
  RingPosition<C::kRawStages> at;
  publish_jobs(p, s.jobs, 0, C::kNarrow ? p.num_wide_lists : p.num_lists, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = at.stage();
      ptx::mbarrier_wait_parity(&raw.k.empty[stage], at.empty_parity());
      load_raw_tile<C>(maps.k, p, job, tile, 0, raw.k, stage);
      ptx::mbarrier_wait_parity(&raw.v.empty[stage], at.empty_parity());
      load_raw_tile<C>(maps.v, p, job, tile, 1, raw.v, stage);
      at.advance();
    });
  });
}

// Sixteen values, two chunks of 8.
template <class T, class KV, class Words>
__device__ __forceinline__ Vec<T> values_8(const Words& words, int half, float2 scale) {
  const unsigned* const from = reinterpret_cast<const unsigned*>(&words) + half * int(sizeof(Words) / 8);
  if constexpr (kIsQuantised<KV>) return kv_values<KV, T>(from, scale);
  else return e4m3_values<T>(from);
}

// A converting warp's share of a tile: eight rows in turn with the others.
template <class C>
__device__ __forceinline__ void convert_tile(const Job& job, int tile, const unsigned char* raw, const __half2* scales,
                                             unsigned char* dst) {
  using T = typename C::T;
  using KV = typename C::KV;
  using Words = std::conditional_t<kKvBits<KV> == 8, uint4, uint2>;
  constexpr int kPanels = C::kPanelsQk;
  constexpr int kRowsOfAllBanks = C::kRawRowBytes < 128 ? 128 / C::kRawRowBytes : 1;
  // opaque: what follows from it would otherwise be kept in registers from tile to tile
  const unsigned thread = ptx::opaque(threadIdx.x), of_eight = thread / 4 % 8, quarter = thread % 4;
  const int first_row = thread / 4 - kConvertWide * 8, first_panel = of_eight / kRowsOfAllBanks % kPanels;
  const int chunk = first_row * kPanelRowBytes + (2 * quarter ^ of_eight) * 16, other_chunk = chunk ^ 16;
  const int own_begin = job.at.kv_begin - tile - first_row, own_end = job.at.kv_end - tile - first_row;
  raw += first_row * C::kRawRowBytes + quarter * int(sizeof(Words));
  const auto is_mine = [&](int r) { return r >= own_begin && r < own_end; };
  const auto load_scale = [&](int r) {
    if constexpr (!C::kHasScales) return float2{};
    else return __half22float2(is_mine(r) ? scales[first_row + r] : __half2{});
  };
  const auto load_words = [&](int r, int panel) {
    Words words{};
    if (C::kHasScales || is_mine(r))
      words = *reinterpret_cast<const Words*>(raw + panel * int(4 * sizeof(Words)) + r * C::kRawRowBytes);
    return words;
  };
  // A step is a panel of a row. The next is read before this one is written: the compiler cannot know that they are not the same.
  constexpr int kSteps = C::kKeys / (8 * kConvertWarps) * kPanels;
  Words next = load_words(0, first_panel);
  float2 next_scale = load_scale(0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int r = step / kPanels * (8 * kConvertWarps), after = (step + 1) / kPanels * (8 * kConvertWarps);
    const Words words = next;
    const float2 scale = next_scale;
    if (step + 1 < kSteps) {
      next = load_words(after, (step + 1) % kPanels ^ first_panel);
      if (after != r) next_scale = load_scale(after);
    }
    unsigned char* const to = dst + (step % kPanels ^ first_panel) * C::kPanelBytes + r * kPanelRowBytes;
    *reinterpret_cast<Vec<T>*>(to + chunk) = values_8<T, KV>(words, 0, scale);
    *reinterpret_cast<Vec<T>*>(to + other_chunk) = values_8<T, KV>(words, 1, scale);
  }
}

// The warps that make the wide lane's tiles of those that TMA brought.
template <class C>
__device__ __forceinline__ void convert_wide(WideStorage<C>& s, RawStorage<C>& raw) {
  RingPosition<C::kRawStages> from;
  RingPosition<C::kStages> to;
  const auto convert = [&](const Job& job, int tile, typename RawStorage<C>::Side& side, unsigned char* dst, uint64_t* full,
                           uint64_t* empty) {
    ptx::mbarrier_wait_parity(&side.full[from.stage()], from.full_parity());
    ptx::mbarrier_wait_parity(empty, to.empty_parity());
    convert_tile<C>(job, tile, side.rows[from.stage()], side.scales[from.stage()], dst);
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&side.empty[from.stage()]), ptx::mbarrier_arrive(full);
  };
  read_jobs(s.jobs, [&](const Job& job) {
    for_each_tile<C>(job, [&](int tile) {
      const int stage = to.stage();
      convert(job, tile, raw.k, s.k[stage], &s.k_full[stage], &s.k_empty[stage]);
      convert(job, tile, raw.v, s.v[stage], &s.v_full[stage], &s.v_empty[stage]);
      from.advance(), to.advance();
    });
  });
}

}  // namespace tilestream::cuda
