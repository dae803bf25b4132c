// out = a b^T in bfloat16, as a Hopper kernel does it: one elected thread loads by TMA into two stages, two warpgroups multiply
// by wgmma one step behind, and the result leaves through stmatrix and TMA. All parts of the PTX layer together.
// data: a [128, 256]; from 16384 on b [64, 256]; from 24576 on out [128, 64].
#include "cases.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/elect.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/tensor_map.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace tilestream;

constexpr int kM = 128, kN = 64, kK = 256, kStepK = 64, kNumSteps = kK / kStepK, kNumStages = 2;
constexpr unsigned kRowBytes = 128, kEightRows = 8 * kRowBytes;

struct Storage {
  alignas(1024) unsigned char a[kNumStages][kM * kRowBytes], b[kNumStages][kN * kRowBytes], out[2][64 * kRowBytes];
  uint64_t full[kNumStages], empty[kNumStages];
};

struct Maps {
  ptx::TensorMap a, b, out;
};

__device__ __forceinline__ void produce(Storage& s, const Maps& maps) {
  for (int step = 0; step < kNumSteps; ++step) {
    const int stage = step % kNumStages;
    ptx::mbarrier_wait_parity(&s.empty[stage], step / kNumStages % 2 ^ 1);
    ptx::mbarrier_arrive_expect_tx(&s.full[stage], sizeof s.a[0] + sizeof s.b[0]);
    ptx::cp_async_bulk_tensor_load(s.a[stage], maps.a, {step * kStepK, 0}, &s.full[stage]);
    ptx::cp_async_bulk_tensor_load(s.b[stage], maps.b, {step * kStepK, 0}, &s.full[stage]);
  }
}

// One warpgroup's 64 rows. A stage is given back when the products of the step after it are under way.
__device__ __forceinline__ void multiply(Storage& s, int group, float (&d)[kN / 2]) {
  for (int step = 0; step < kNumSteps; ++step) {
    const int stage = step % kNumStages;
    ptx::mbarrier_wait_parity(&s.full[stage], step / kNumStages % 2);
    const uint64_t a = ptx::wgmma_descriptor(s.a[stage] + group * 64 * kRowBytes, ptx::Swizzle::k128, kEightRows);
    const uint64_t b = ptx::wgmma_descriptor(s.b[stage], ptx::Swizzle::k128, kEightRows);
    ptx::wgmma_fence(d);
#pragma unroll
    for (unsigned k = 0; k < kRowBytes; k += 32)
      ptx::wgmma_m64k16_bf16(d, ptx::wgmma_advance(a, k), ptx::wgmma_advance(b, k), step > 0 || k > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (step > 0 && threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&s.empty[(step - 1) % kNumStages]);
  }
  ptx::wgmma_wait_group<0>(d);
}

__device__ __forceinline__ void store(Storage& s, int group, const Maps& maps, const float (&d)[kN / 2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const unsigned row = warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < kN / 8; j += 2) {
    unsigned packed[4];
    for (int i = 0; i < 4; ++i) packed[i] = ptx::cvt_bf16x2(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
    const unsigned at = ptx::swizzled(ptx::Swizzle::k128, row * kRowBytes + (j + lane / 16) * 16);
    ptx::stmatrix_x4(s.out[group] + at, packed);
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1 + group, 128);
  if (warp == 0 && ptx::elect_sync()) {
    ptx::cp_async_bulk_tensor_store(maps.out, {0, group * 64}, s.out[group]);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

__global__ void __launch_bounds__(384, 1) gemm_kernel(const __grid_constant__ Maps maps) {
  Storage& s = cuda::dynamic_smem<Storage>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kNumStages; ++i) ptx::mbarrier_init(&s.full[i], 1), ptx::mbarrier_init(&s.empty[i], 2);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = int(threadIdx.x / 128) - 1;
  if (group < 0) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x < 32 && ptx::elect_sync()) produce(s, maps);
  } else {
    ptx::setmaxnreg_inc<240>();
    float d[kN / 2];
    multiply(s, group, d);
    store(s, group, maps, d);
  }
}

const simt_test::Register gemm("gemm", [](float* data, const float*) {
  const auto map = [](float* base, uint64_t columns, uint64_t rows, uint32_t box_rows) {
    return ptx::make_tensor_map(base, 2, {{columns, 2, 64}, {rows, 2 * columns, box_rows}}, ptx::Swizzle::k128);
  };
  const Maps maps{map(data, kK, kM, kM), map(data + 16384, kK, kN, kN), map(data + 24576, kN, kM, 64)};
  cuda::launch(gemm_kernel, {.grid = 1, .block = 384, .smem_bytes = sizeof(Storage)}, maps);
});

}  // namespace
