// Each matrix wrapper alone, on matrices in row-major order: data[0..] a, data[1024..] b, data[2048..] the result.
// test_ptx.py has the formulas.
#include "cases.h"
#include "cuda/common/fp8.cuh"
#include "cuda/ptx/fp8.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"

namespace {

using namespace tilestream;

// 32 rows of 8 elements of 16 bits in shared memory.
struct Storage {
  alignas(16) unsigned short tile[32][8];
};

__device__ __forceinline__ void fill(Storage& s, const float* data) {
  for (int i = 0; i < 8; ++i) s.tile[threadIdx.x][i] = (unsigned short)data[8 * threadIdx.x + i];
  __syncwarp();
}

template <int kNum>
__device__ __forceinline__ void put(float* data, const unsigned (&d)[kNum]) {
  for (int i = 0; i < kNum; ++i) {
    data[2048 + 2 * (kNum * threadIdx.x + i)] = float(d[i] & 0xffff);
    data[2048 + 2 * (kNum * threadIdx.x + i) + 1] = float(d[i] >> 16);
  }
}

CASE(ldmatrix_x4, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = cuda::dynamic_smem<Storage>();
  fill(s, data);
  unsigned d[4];
  ptx::ldmatrix_x4(d, s.tile[threadIdx.x]);
  put(data, d);
}

CASE(ldmatrix_x2, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = cuda::dynamic_smem<Storage>();
  fill(s, data);
  unsigned d[2];
  ptx::ldmatrix_x2(d, s.tile[threadIdx.x]);
  put(data, d);
}

CASE(ldmatrix_x4_trans, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = cuda::dynamic_smem<Storage>();
  fill(s, data);
  unsigned d[4];
  ptx::ldmatrix_x4_trans(d, s.tile[threadIdx.x]);
  put(data, d);
}

CASE(stmatrix_x4, .grid = 1, .block = 32, .smem_bytes = sizeof(Storage)) {
  Storage& s = cuda::dynamic_smem<Storage>();
  unsigned d[4];
  for (int i = 0; i < 4; ++i)
    d[i] = unsigned(data[2 * (4 * threadIdx.x + i)]) | unsigned(data[2 * (4 * threadIdx.x + i) + 1]) << 16;
  ptx::stmatrix_x4(s.tile[threadIdx.x], d);
  __syncwarp();
  for (int i = 0; i < 8; ++i) data[2048 + 8 * threadIdx.x + i] = float(s.tile[threadIdx.x][i]);
}

// Fragments by the tables of the ISA, written out: a is [16][k] in data, b is [8][k] (its columns) in data + 1024.
// `pack(p)` gives the register of the elements from p on.
template <int kPerRegister, class D, class Pack, class Mma>
__device__ __forceinline__ void multiply(float* data, Pack pack, Mma mma) {
  constexpr int kDepth = 8 * kPerRegister;
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  const float* a = data + group * kDepth + in_group * kPerRegister;
  const float* b = data + 1024 + group * kDepth + in_group * kPerRegister;
  const unsigned fragment_a[4] = {pack(a), pack(a + 8 * kDepth), pack(a + kDepth / 2), pack(a + 8 * kDepth + kDepth / 2)};
  const unsigned fragment_b[2] = {pack(b), pack(b + kDepth / 2)};
  D d[4] = {D(1), D(2), D(3), D(4)};
  mma(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) data[2048 + (group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = float(d[i]) - float(i + 1);
}

CASE(mma_f16, .grid = 1, .block = 32) {
  multiply<2, float>(data, [](const float* p) { return ptx::cvt_f16x2(p[0], p[1]); },
                     [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k16_f16(d, a, b); });
}
CASE(mma_bf16, .grid = 1, .block = 32) {
  multiply<2, float>(data, [](const float* p) { return ptx::cvt_bf16x2(p[0], p[1]); },
                     [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k16_bf16(d, a, b); });
}
CASE(mma_e4m3, .grid = 1, .block = 32) {
  multiply<4, float>(
      data, [](const float* p) { return ptx::cvt_e4m3x2(p[0], p[1]) | unsigned(ptx::cvt_e4m3x2(p[2], p[3])) << 16; },
      [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k32_e4m3(d, a, b); });
}

template <int kBits>
__device__ __forceinline__ unsigned pack_integers(const float* p) {
  unsigned packed = 0;
  for (int i = 0; i < 32 / kBits; ++i) packed |= (unsigned(int(p[i])) & ((1u << kBits) - 1)) << kBits * i;
  return packed;
}
CASE(mma_s8, .grid = 1, .block = 32) {
  multiply<4, int>(data, pack_integers<8>, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k32_s8(d, a, b); });
}
CASE(mma_u8s8, .grid = 1, .block = 32) {
  multiply<4, int>(data, pack_integers<8>, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k32_u8s8(d, a, b); });
}
CASE(mma_s4, .grid = 1, .block = 32) {
  multiply<8, int>(data, pack_integers<4>, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k64_s4(d, a, b); });
}
CASE(mma_u4s4, .grid = 1, .block = 32) {
  multiply<8, int>(data, pack_integers<4>, [](auto& d, auto& a, auto& b) { ptx::mma_m16n8k64_u4s4(d, a, b); });
}

// Conversions of one float each: data[i] -> data[2048 + i].
CASE(round_f16, .grid = 8, .block = 128) {
  const int i = 128 * blockIdx.x + threadIdx.x;
  data[2048 + i] = __half2float(__float2half_rn(data[i]));
}
CASE(round_bf16, .grid = 8, .block = 128) {
  const int i = 128 * blockIdx.x + threadIdx.x;
  data[2048 + i] = __bfloat162float(__float2bfloat16_rn(data[i]));
}
CASE(round_e4m3, .grid = 8, .block = 128) {
  const int i = 128 * blockIdx.x + threadIdx.x;
  __nv_fp8_e4m3 v;
  v.__x = (unsigned char)(ptx::cvt_e4m3x2(data[i], 0.0f) & 0xff);
  data[2048 + i] = float(v);
}

// e4m3 without the instructions: 1 where the bits are the instructions', for every code and for the float data[i].
CASE(e4m3_by_integers, .grid = 16, .block = 128) {
  const int i = 128 * blockIdx.x + threadIdx.x;
  const auto code = (unsigned short)(i & 0xff | (255 - i & 0xff) << 8);
  const bool wide = cuda::e4m3x2_to_f16x2_by_integers(code) == ptx::cvt_f16x2_e4m3x2(code);
  const bool narrow = cuda::f32_to_e4m3_by_integers(data[i]) == (ptx::cvt_e4m3x2(data[i], 0.0f) & 0xffu);
  data[2048 + i] = wide && narrow ? 1.0f : 0.0f;
}

}  // namespace
