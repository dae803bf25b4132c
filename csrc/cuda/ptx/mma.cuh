// mma.sync: d += a * b on the tensor cores, by one warp. PTX ISA 9.7.14.5. Twin: tests/simt/include/cuda/ptx/mma.cuh.
//
// With g = lane / 4 and t = lane % 4, and e elements per 32-bit register (2 of 16 bits, 4 of 8, 8 of 4):
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns e t .. e t + e - 1, the last two 4 e columns further on
//   b[0], b[1]:             column g; rows e t .. e t + e - 1, the second 4 e rows further on
//   d[0], d[1]; d[2], d[3]: rows g; g + 8; columns 2 t, 2 t + 1
// Lower elements stand in lower bits. Every lane of the warp takes part. Registers only: orders no memory, hence no
// "memory" and no volatile: the compiler may schedule them.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

#define TILESTREAM_MMA(NAME, INSTRUCTION, D, LETTER)                                                                   \
  __device__ __forceinline__ void NAME(D (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                    \
    asm("mma.sync.aligned." INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+" LETTER(d[0]), "+" LETTER(d[1]), "+" LETTER(d[2]), "+" LETTER(d[3])                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                           \
  }

TILESTREAM_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")              // sm_80
TILESTREAM_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")           // sm_80
TILESTREAM_MMA(mma_m16n8k32_s8, "m16n8k32.row.col.s32.s8.s8.s32", int, "r")                   // sm_80
TILESTREAM_MMA(mma_m16n8k32_u8s8, "m16n8k32.row.col.s32.u8.s8.s32", int, "r")                 // sm_80
TILESTREAM_MMA(mma_m16n8k64_s4, "m16n8k64.row.col.s32.s4.s4.s32", int, "r")                   // sm_80; emulated from sm_90 on
TILESTREAM_MMA(mma_m16n8k64_u4s4, "m16n8k64.row.col.s32.u4.s4.s32", int, "r")                 // as above, a unsigned
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
TILESTREAM_MMA(mma_m16n8k32_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "f")           // sm_89
#endif
#undef TILESTREAM_MMA

}  // namespace tilestream::ptx
