// The Hopper attention's narrow lane: its shared memory, and the warp that fills it.
#pragma once

#include "cuda/attention_sm90_convert.cuh"

namespace tilestream::cuda {

// As Sm90Config has them for the wide lane.
struct NarrowTile {
  static constexpr int kRows = 16, kKeys = 64;
};
constexpr int kNarrowRowsBytes = NarrowTile::kRows * kPanelRowBytes;

template <class C>
struct NarrowStorage {
  // A slot holds a panel of K or V; of a cache that is converted a tile of it, and its scales.
  static constexpr int kSlotsK = C::kConverted ? 1 : C::kPanelsQk, kSlotsV = C::kConverted ? 1 : C::kPanelsVo;
  static constexpr int kRowBytes = C::kConverted ? C::kRawRowBytes : kPanelRowBytes, kSlotBytes = NarrowTile::kKeys * kRowBytes;
  static constexpr int kScales = C::kConverted && C::kHasScales ? NarrowTile::kKeys : 0;
  // What the wide lane leaves, in slots; 128 KB in flight are more than any memory asks for.
  static constexpr int kOtherBytes = (C::kPanelsQk + 2) * kNarrowRowsBytes + 2048 + (C::kConverted ? sizeof(RawStorage<C>) : 0);
  static constexpr int kSlots = std::min(16, int(227 * 1024 - sizeof(WideStorage<C>) - kOtherBytes) /
                                                 int(kSlotBytes + kScales * sizeof(__half2)));
  static_assert(kSlots > kSlotsK + kSlotsV, "a tile and more");

  alignas(1024) unsigned char slots[kSlots][kSlotBytes];
  alignas(16) __half2 scales[kSlots][kScales > 0 ? kScales : 1];
  alignas(1024) unsigned char q[C::kPanelsQk * kNarrowRowsBytes];
  alignas(1024) unsigned char weights[2][kNarrowRowsBytes];  // of this tile, and of the one before
  uint64_t full[kSlots], empty[kSlots];
  JobRing jobs;
  float exchange[4][NarrowTile::kRows];     // of each warp: maxima or sums of rows
  alignas(4) unsigned char is_above[2][4];  // whether a warp's weights are too large, beside `weights`

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kSlots; ++i) ptx::mbarrier_init(&full[i], 1), ptx::mbarrier_init(&empty[i], 4);
    jobs.init(4);
  }
};

// The pattern of a row's length spreads what the narrow warpgroup reads at once of a cache that is converted over all banks.
template <class C>
constexpr ptx::Swizzle kRawSwizzle = C::kRawRowBytes == 128  ? ptx::Swizzle::k128
                                     : C::kRawRowBytes == 64 ? ptx::Swizzle::k64
                                                             : ptx::Swizzle::k32;

// RingPosition for any number of stages.
template <class C>
class SlotPosition {
  static constexpr int kSlots = NarrowStorage<C>::kSlots;

 public:
  __device__ __forceinline__ int slot() const { return slot_; }
  // Of the piece's panel; kSlots at most.
  __device__ __forceinline__ int slot(int panel) const { return slot_ + panel < kSlots ? slot_ + panel : slot_ + panel - kSlots; }
  __device__ __forceinline__ unsigned full_parity() const { return parity_; }
  __device__ __forceinline__ unsigned empty_parity() const { return parity_ ^ 1; }
  __device__ __forceinline__ void advance() {
    if (++slot_ == kSlots) slot_ = 0, parity_ ^= 1;
  }

 private:
  int slot_ = 0;
  unsigned parity_ = 0;
};

// One warp: a piece as the cache has it, and its scales. page: of this lane's box, one of the first 64 / page_size lanes.
template <class C>
__device__ __forceinline__ void load_raw_piece(const ptx::TensorMap& map, const AttentionParams& p, const Job& job, int side,
                                               int page, NarrowStorage<C>& s, SlotPosition<C>& at) {
  const int lane = threadIdx.x % kWarpSize, first = lane << job.page_shift, slot = at.slot();
  const bool is_box = first < NarrowTile::kKeys, has_scales = C::kHasScales && is_box && page < p.num_pages;
  const int scale_bytes = job.page_size * int(sizeof(__half2)),
            num_bytes = __popc(__ballot_sync(kFullMask, has_scales)) * scale_bytes;
  ptx::mbarrier_wait_parity(&s.empty[slot], at.empty_parity());
  if (lane == 0) ptx::mbarrier_arrive_expect_tx(&s.full[slot], NarrowStorage<C>::kSlotBytes + num_bytes);
  __syncwarp();
  if (is_box)
    ptx::cp_async_bulk_tensor_load(s.slots[slot] + first * C::kRawRowBytes, map, {0, 0, job.at.kv_head, page}, &s.full[slot]);
  if (has_scales) {
    const KvRows rows = kv_rows<typename C::KV>(p, side, job.at.kv_head, job.num_kv_heads, job.page_size);
    ptx::cp_async_bulk_load(s.scales[slot] + first, rows.scale(page, 0), scale_bytes, &s.full[slot]);
  }
  at.advance();
}

// One warp: a piece's panels, each to the next slot. page: of this lane's box, one of the first 64 / page_size lanes.
template <int kPanels, class C>
__device__ __forceinline__ void load_piece(const ptx::TensorMap& map, const Job& job, int page, NarrowStorage<C>& s,
                                           SlotPosition<C>& at) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
    const int slot = at.slot();
    ptx::mbarrier_wait_parity(&s.empty[slot], at.empty_parity());
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(&s.full[slot], NarrowStorage<C>::kSlotBytes);
    __syncwarp();
    if (lane < NarrowTile::kKeys >> job.page_shift)
      ptx::cp_async_bulk_tensor_load(s.slots[slot] + (lane << job.page_shift) * kPanelRowBytes, map,
                                     {panel * kPanelRowBytes, 0, job.at.kv_head, page}, &s.full[slot]);
    at.advance();
  }
}

// The warp that brings the narrow lane's pieces.
template <class C>
__device__ __forceinline__ void load_narrow(const AttentionParams& p, const KvMaps& maps, NarrowStorage<C>& s) {
  const int lane = threadIdx.x % kWarpSize;
  SlotPosition<C> at;
  publish_jobs(p, s.jobs, p.num_wide_lists, p.num_lists, [&](const Job& job) {
    // A page outside the job is not looked up: one past the last of the tensor gives zeros.
    const auto page_in = [&](int tile) {
      const int key = tile + ((lane << job.page_shift) % NarrowTile::kKeys);
      const bool is_mine = key + job.page_size > job.at.kv_begin && key < job.at.kv_end;
      return is_mine ? int(job.page(key)) : p.num_pages;
    };
    const auto load_k = [&](int page) {
      if constexpr (C::kConverted) load_raw_piece<C>(maps.narrow_k, p, job, 0, page, s, at);
      else load_piece<C::kPanelsQk>(maps.k, job, page, s, at);
    };
    const auto load_v = [&](int page) {
      if constexpr (C::kConverted) load_raw_piece<C>(maps.narrow_v, p, job, 1, page, s, at);
      else load_piece<C::kPanelsVo>(maps.v, job, page, s, at);
    };
    for_each_row_tile<NarrowTile>(job, [&](const RowTile& rows) {
      // Looked up a tile before they are needed.
      int page = page_in(rows.keys_begin), next_page = page_in(rows.keys_begin + NarrowTile::kKeys);
      if (rows.keys_begin < rows.keys_end) load_k(page);
#pragma unroll 1
      for (int tile = rows.keys_begin; tile < rows.keys_end; tile += NarrowTile::kKeys) {
        const int page_after = page_in(tile + 2 * NarrowTile::kKeys);
        if (tile + NarrowTile::kKeys < rows.keys_end) load_k(next_page);
        load_v(page);
        page = next_page, next_page = page_after;
      }
    });
  });
}

}  // namespace tilestream::cuda
