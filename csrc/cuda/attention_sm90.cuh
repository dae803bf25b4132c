// Attention on Hopper: TMA and wgmma, warp-specialised, one persistent block on an SM. docs/kernels/attention_sm90.md.
//
// A block is a loading warpgroup, two or three wide ones (64 rows each) and a narrow one, and walks two streams of jobs at
// once (plan.h): the wide lane multiplies, bound by tensor cores, while the narrow lane reads the caches of decodes, bound by
// memory. Sizes: tilestream/attention_tiles.h.
// A row's bits depend on its own q, its job's keys and its mask, and on the lane that takes it.
// Source: FlashAttention-3 (2407.08608), POD-Attention (2410.18038), Lean Attention (2405.10480).
#pragma once

#include "cuda/attention_row.h"
#include "cuda/attention_sm90_narrow.cuh"
#include "cuda/attention_sm90_wide.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace tilestream::cuda {

struct NoStorage {};
template <class C>
struct Sm90Storage {
  WideStorage<C> wide;
  [[no_unique_address]] std::conditional_t<C::kNarrow, NarrowStorage<C>, NoStorage> narrow;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ LogitRule rule,
                          const __grid_constant__ KvMaps maps) {
  auto& s = dynamic_smem<Sm90Storage<C>>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(maps.k);
    ptx::prefetch_tensormap(maps.v);
    s.wide.init();
    if constexpr (C::kNarrow) s.narrow.init();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = int(threadIdx.x / kGroupThreads) - 1;
  if (group < 0) {
    ptx::setmaxnreg_dec<C::kSizes.load_registers>();
    const int warp = threadIdx.x / kWarpSize;
    if (warp == kLoadWide) load_wide<C>(p, maps, s.wide);
    else if (warp == kRepairWide) repair_wide<C>(s.wide);
    if constexpr (C::kNarrow) {
      if (warp == kLoadNarrow) load_narrow<C>(p, maps, s.narrow);
    }
  } else if (group < C::kGroups) {
    ptx::setmaxnreg_inc<C::kSizes.wide_registers>();
    attend_wide<C>(p, rule, s.wide, group);
  } else if constexpr (C::kNarrow) {
    ptx::setmaxnreg_dec<C::kSizes.narrow_registers>();
    attend_narrow<C>(p, rule, s.narrow);
  }
}

template <class C>
void launch_attention_sm90(const AttentionParams& p, Stream stream) {
  constexpr size_t kSmemBytes = sizeof(Sm90Storage<C>);
  static_assert(kSmemBytes <= 227 * 1024, "more than an SM has");
  const auto kernel = attention_sm90_kernel<C>;
  const LaunchConfig config{.grid = resident_blocks(kernel, C::kThreads, kSmemBytes), .block = C::kThreads, .smem_bytes = kSmemBytes,
                            .stream = stream};
  launch(kernel, config, p, make_logit_rule(p), KvMaps{kv_map(p, 0), kv_map(p, 1)});
}

// A cache of no pages has no address that a tensor map could hold.
inline bool fits_sm90(const AttentionParams& p) { return device_arch() / 10 == 9 && p.num_pages > 0; }

template <class T, class KV, int kTile>
constexpr AttentionRow sm90_row(DType kv_dtype, DType q_dtype) {
  return {.kv_dtype = kv_dtype, .q_dtype = q_dtype, .max_dim_qk = kAttentionTiles[kTile].dim_qk,
          .max_dim_vo = kAttentionTiles[kTile].dim_vo, .launch = launch_attention_sm90<Sm90Config<T, KV, kTile>>,
          .fits = fits_sm90, .merges = true};
}

}  // namespace tilestream::cuda
