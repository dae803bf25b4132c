// Attention on Hopper: TMA and wgmma, warp-specialised, one persistent block on an SM. docs/kernels/attention_sm90.md.
//
// A block is a loading warpgroup, two or three wide ones (64 rows each) and a narrow one, and walks two streams of jobs at
// once (plan.h): the wide lane multiplies, bound by tensor cores, while the narrow lane reads the caches of decodes, bound by
// memory. Sizes: tilestream/attention_tiles.h.
// A row's bits depend on its own q, its job's keys and its mask, and on the lane that takes it.
// Source: FlashAttention-3 (2407.08608), POD-Attention (2410.18038), Lean Attention (2405.10480).
#pragma once

#include "cuda/attention_row.h"
#include "cuda/attention_sm90_convert.cuh"
#include "cuda/attention_sm90_float8.cuh"
#include "cuda/attention_sm90_narrow.cuh"
#include "cuda/attention_sm90_wide.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace tilestream::cuda {

struct NoStorage {};
template <class C>
struct Sm90Storage {
  WideStorage<C> wide;
  [[no_unique_address]] RawStorage<C> raw;
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
    s.wide.init(), s.raw.init();
    if constexpr (C::kNarrow) s.narrow.init();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = int(threadIdx.x / kGroupThreads) - 1;
  if (group < 0) {
    ptx::setmaxnreg_dec<C::kSizes.load_registers>();
    const int warp = threadIdx.x / kWarpSize;
    if constexpr (C::kConverted) {
      if (warp == kLoadWide) load_raw<C>(p, maps, s.wide, s.raw);
      else if (warp >= kConvertWide) convert_wide<C>(s.wide, s.raw);
    } else if constexpr (C::kFloat8) {
      if (warp == kLoadWide) load_float8<C>(p, maps, s.wide, s.raw);
      else if (warp >= kConvertWide) transpose_wide<C>(s.wide, s.raw);
    } else {
      if (warp == kLoadWide) load_wide<C>(p, maps, s.wide);
      else if (warp == kRepairWide) repair_wide<C>(s.wide);
    }
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
  const LaunchConfig config{
      .grid = resident_blocks(kernel, C::kThreads, kSmemBytes), .block = C::kThreads, .smem_bytes = kSmemBytes, .stream = stream};
  constexpr uint32_t kRowBytes = C::kConverted ? C::kRawRowBytes : C::kRowBytes;
  constexpr ptx::Swizzle kSwizzle = C::kConverted ? ptx::Swizzle::kNone : C::kSwizzle;
  KvMaps maps{.k = kv_map(p, 0, kRowBytes, kSwizzle), .v = kv_map(p, 1, kRowBytes, kSwizzle)};
  if constexpr (C::kConverted && C::kNarrow)
    maps.narrow_k = kv_map(p, 0, kRowBytes, kRawSwizzle<C>), maps.narrow_v = kv_map(p, 1, kRowBytes, kRawSwizzle<C>);
  launch(kernel, config, p, make_logit_rule(p), maps);
}

// A cache of no pages has no address that a tensor map could hold, nor has one whose rows are not at multiples of 16 bytes,
// such as int4 with a head dim of 80: that is for the other kernels.
inline bool fits_sm90(const AttentionParams& p) {
  const int64_t bytes = p.kv_dtype == DType::kUInt4 ? 1 : dtype_bytes(p.kv_dtype, 1);
  return device_arch() / 10 == 9 && p.num_pages > 0 &&
         rows_aligned(p.k_cache, bytes, p.k_page_stride, p.k_head_stride, p.k_token_stride) &&
         rows_aligned(p.v_cache, bytes, p.v_page_stride, p.v_head_stride, p.v_token_stride) && rows_aligned(p.kv_scales, 1);
}

template <class T, class KV, int kTile>
constexpr AttentionRow sm90_row(DType kv_dtype, DType q_dtype) {
  return {.kv_dtype = kv_dtype, .q_dtype = q_dtype, .max_dim_qk = kAttentionTiles[kTile].dim_qk,
          .max_dim_vo = kAttentionTiles[kTile].dim_vo, .launch = launch_attention_sm90<Sm90Config<T, KV, kTile>>,
          .fits = fits_sm90, .merges = true};
}

}  // namespace tilestream::cuda
