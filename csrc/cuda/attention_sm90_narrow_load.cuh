// The Hopper attention's narrow lane: its shared memory, and the warp that fills it.
#pragma once

#include "cuda/attention_sm90_load.cuh"

namespace tilestream::cuda {

// As Sm90Config has them for the wide lane.
struct NarrowTile {
  static constexpr int kRows = 16, kKeys = 64;
};
constexpr int kSlotBytes = NarrowTile::kKeys * kPanelRowBytes;
constexpr int kNarrowRowsBytes = NarrowTile::kRows * kPanelRowBytes;

template <class C>
struct NarrowStorage {
  // What the wide lane leaves, in slots; 128 KB in flight are more than any memory asks for.
  static constexpr int kOtherBytes = (C::kPanelsQk + 2) * kNarrowRowsBytes + 1024;
  static constexpr int kSlots = std::min(16, int(227 * 1024 - sizeof(WideStorage<C>) - kOtherBytes) / kSlotBytes);
  static_assert(kSlots > C::kPanelsQk + C::kPanelsVo, "a tile and more");

  alignas(1024) unsigned char slots[kSlots][kSlotBytes];
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

// One warp: a piece's panels, each to the next slot. page: of this lane's box, one of the first 64 / page_size lanes.
template <int kPanels, class C>
__device__ __forceinline__ void load_piece(const ptx::TensorMap& map, const Job& job, int page, NarrowStorage<C>& s, SlotPosition<C>& at) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
    const int slot = at.slot();
    ptx::mbarrier_wait_parity(&s.empty[slot], at.empty_parity());
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(&s.full[slot], kSlotBytes);
    __syncwarp();
    if (lane < NarrowTile::kKeys >> job.page_shift)
      ptx::cp_async_bulk_tensor_load(s.slots[slot] + (lane << job.page_shift) * kPanelRowBytes, map,
                                     {panel * kPanelColumns, 0, job.at.kv_head, page}, &s.full[slot]);
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
    for_each_row_tile<NarrowTile>(job, [&](const RowTile& rows) {
      // Looked up a tile before they are needed.
      int page = page_in(rows.keys_begin), next_page = page_in(rows.keys_begin + NarrowTile::kKeys);
      if (rows.keys_begin < rows.keys_end) load_piece<C::kPanelsQk>(maps.k, job, page, s, at);
#pragma unroll 1
      for (int tile = rows.keys_begin; tile < rows.keys_end; tile += NarrowTile::kKeys) {
        const int page_after = page_in(tile + 2 * NarrowTile::kKeys);
        if (tile + NarrowTile::kKeys < rows.keys_end) load_piece<C::kPanelsQk>(maps.k, job, next_page, s, at);
        load_piece<C::kPanelsVo>(maps.v, job, page, s, at);
        page = next_page, next_page = page_after;
      }
    });
  });
}

}  // namespace tilestream::cuda
