// Linears on weights in groups of 128, on Hopper: TMA and wgmma, warp-specialised. docs/kernels/linear_w4ax.md.
//
// The weight's columns are the rows of wgmma m64nNk32, from registers; a group's rows of x are its columns, N at a time, from
// shared memory. A group's product is exact in int32, and its two scales are applied in float32, one addition and two fma for
// each output and group. The first warpgroup brings all that; INT4 groups it widens to int8, so that mixed rows meet one
// product. K is cut into slices, of n and k alone, that are added in their order.
//
// Narrow blocks, up to 128 rows by 64 columns and one slice of K, the slices of a tile in a cluster; two on an SM up to 64 rows.
// Bound by the weights' bytes up to there: the rings keep 2 x 63, 42 and 25 KB of them under way at 16, 32 and 64 rows, where
// 4.8 TB/s with a latency of 1 us (an estimate) ask for 36 KB. 3.9 TB/s are 64 columns of a group every 250 cycles of an SM,
// in which a warp, one on each scheduler, issues 140, 166 and 217 instructions.
//
// Wide blocks, 128 rows by 256 columns in two warpgroups, that stay and walk tiles. A group of a tile is 1,024 cycles of the
// tensor cores and 2 x 618 instructions of a scheduler, which bind: at most 83 % of the tensor cores' rate. Each warpgroup
// waits for its own 64 x 64 products, and the other's are under way meanwhile. It brings 33 KB a group, 27 bytes a cycle.
#include "cuda/linear_sm90.h"

#include "cuda/linear_sm90_load.cuh"
#include "cuda/linear_sm90_multiply.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace tilestream::cuda {
namespace {

// y from what the blocks of the cluster left, each a share of the tile's rows.
template <class C>
__device__ __forceinline__ void merge_slices(const LinearParams& p, const LinearWork<C>& work) {
  const int tile = work.first_tile(), rank = int(blockIdx.x) % work.num_slices;
  for (int i = rank * C::kThreads + threadIdx.x; i < C::kTokens * C::kColumns; i += work.num_slices * C::kThreads) {
    const int64_t row = work.first_row(tile) + i / C::kColumns, n = work.first_column(tile) + i % C::kColumns;
    if (row >= p.m || n >= p.n || (is_gated(p) && n % 2 != 0)) continue;
    store_output(p, row, n, [&](int64_t of) {
      float sum = *slice_sum(p, 0, row, of);
      for (int slice = 1; slice < work.num_slices; ++slice) sum += *slice_sum(p, slice, row, of);
      return sum;
    });
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    linear_sm90_kernel(const __grid_constant__ LinearParams p, const __grid_constant__ LinearWork<C> work,
                       const __grid_constant__ LinearMaps maps) {
  auto& s = dynamic_smem<LinearSm90Storage<C>>();
  if (threadIdx.x == 0) {
    s.init();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize;
  if (warp < 4) {
    if constexpr (C::kWide) ptx::setmaxnreg_dec<C::kLoadRegisters>();
    if (warp >= kFirstWidenWarp) {
      widen_rows<C>(work, s, warp - kFirstWidenWarp);
    } else if (warp == kScaleWarp) {
      load_scales<C>(p, work, s);
    } else {
      if (ptx::elect_sync()) load_tiles<C>(p, work, maps, s);
      __syncwarp();
    }
  } else {
    if constexpr (C::kWide) ptx::setmaxnreg_inc<C::kMultiplyRegisters>();
    Multiplier<C>(p, work, s, warp / 4 - 1).run();
  }
  if constexpr (!C::kWide) {
    if (work.num_slices == 1) return;
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    merge_slices<C>(p, work);
  }
}

template <class C>
void launch_sm90(const LinearParams& p, Stream stream) {
  constexpr size_t kSmemBytes = sizeof(LinearSm90Storage<C>);
  static_assert(C::kBlocksPerSm * (kSmemBytes + 1024) <= 228 * 1024, "more than an SM has");
  const auto kernel = linear_sm90_kernel<C>;
  const LinearWork<C> work(p);
  LaunchConfig config{.block = C::kThreads, .smem_bytes = kSmemBytes, .stream = stream};
  if constexpr (C::kWide) {
    const unsigned most = std::min(resident_blocks(kernel, C::kThreads, kSmemBytes), unsigned(kSm90Sms));
    config.grid = std::min(unsigned(work.num_tiles), most);
  } else {
    config.grid = unsigned(work.num_tiles * work.num_slices), config.cluster = unsigned(work.num_slices);
  }
  launch(kernel, config, p, work, linear_maps<C>(p));
}

// Instantiations: 3 formats x tiles of 16, 32, 64 and 128 rows of 64 columns, and of 128 rows of 256, or of 64 with
// zeros, which take registers.
template <PackedFormat F>
void launch_format(const LinearParams& p, Stream stream) {
  if (sm90_is_wide(p)) launch_sm90<LinearSm90<F, has_zero(F) ? 64 : 128, 2, 2>>(p, stream);
  else if (p.m <= 16) launch_sm90<LinearSm90<F, 16, 1, 1>>(p, stream);
  else if (p.m <= 32) launch_sm90<LinearSm90<F, 32, 1, 1>>(p, stream);
  else if (p.m <= 64) launch_sm90<LinearSm90<F, 64, 1, 1>>(p, stream);
  else launch_sm90<LinearSm90<F, 128, 1, 1>>(p, stream);
}

}  // namespace

bool linear_sm90(const LinearParams& p, Stream stream) {
  if (device_arch() / 10 != 9 || !rows_aligned(p.x_q.q, 1)) return false;
  with_format(p.format, [&](auto format) {
    if constexpr (group_k(decltype(format)::value) == kScaleK) launch_format<decltype(format)::value>(p, stream);
  });
  return true;
}

}  // namespace tilestream::cuda
