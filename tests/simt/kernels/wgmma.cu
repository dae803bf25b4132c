// Each form of wgmma alone. data[0..7], as integers: swizzle; stride, leading and start bytes of a; the same
// of b; accumulate. data[64..] is the image of shared memory, data[12800..] the fragments of a, data[16384..]
// the result [64][n]. test_wgmma.py has the formulas.
#include "cases.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace {

using namespace tilestream;
using ptx::Major;

struct Storage {
  alignas(1024) unsigned image[12288];
};

template <int kNum, class D, class F>
__device__ __forceinline__ void product(float* data, F wgmma) {
  Storage& s = cuda::dynamic_smem<Storage>();
  const auto* words = reinterpret_cast<const unsigned*>(data);
  for (int i = threadIdx.x; i < 12288; i += 128) s.image[i] = words[64 + i];
  ptx::fence_proxy_async();
  __syncthreads();

  const auto tile = [&](const unsigned* layout) {
    return ptx::wgmma_descriptor(&s.image[layout[2] / 4], ptx::Swizzle(words[0]), layout[0], layout[1]);
  };
  D d[kNum];
  unsigned a[4];
  for (int i = 0; i < kNum; ++i) d[i] = D(i % 7);
  for (int i = 0; i < 4; ++i) a[i] = words[12800 + 4 * threadIdx.x + i];
  ptx::wgmma_fence(d, a);
  wgmma(d, a, tile(words + 1), tile(words + 4), words[7] != 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d, a);

  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < kNum; ++i) data[16384 + (row + i / 2 % 2 * 8) * 2 * kNum + i / 4 * 8 + column + i % 2] = float(d[i]);
}

#define WGMMA(NAME, NUM, D, ...)                                                                             \
  CASE(NAME, .grid = 1, .block = 128, .smem_bytes = sizeof(Storage)) {                                       \
    product<NUM, D>(data, [](auto& d, [[maybe_unused]] auto& a, [[maybe_unused]] uint64_t desc_a,            \
                             uint64_t desc_b, bool accumulate) { ptx::__VA_ARGS__; });                       \
  }

WGMMA(wgmma_f16_64_kk, 32, float, wgmma_m64k16_f16(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_f16_128_km, 64, float, wgmma_m64k16_f16<Major::kK, Major::kMN>(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_bf16_96_mk, 48, float, wgmma_m64k16_bf16<Major::kMN>(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_bf16_256_mm, 128, float, wgmma_m64k16_bf16<Major::kMN, Major::kMN>(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_e4m3_32_kk, 16, float, wgmma_m64k32_e4m3(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_s8_16_kk, 8, int, wgmma_m64k32_s8(d, desc_a, desc_b, accumulate))
WGMMA(wgmma_f16_8_rk, 4, float, wgmma_m64k16_f16(d, a, desc_b, accumulate))
WGMMA(wgmma_bf16_192_rm, 96, float, wgmma_m64k16_bf16<Major::kMN>(d, a, desc_b, accumulate))
WGMMA(wgmma_bf16_176_rk, 88, float, wgmma_m64k16_bf16(d, a, desc_b, accumulate))
WGMMA(wgmma_e4m3_112_rk, 56, float, wgmma_m64k32_e4m3(d, a, desc_b, accumulate))
WGMMA(wgmma_e4m3_160_rk, 80, float, wgmma_m64k32_e4m3(d, a, desc_b, accumulate))
WGMMA(wgmma_s8_80_rk, 40, int, wgmma_m64k32_s8(d, a, desc_b, accumulate))

}  // namespace
