// ldmatrix, stmatrix: 8x8 matrices of 16-bit elements between shared memory and the fragments of mma. PTX ISA
// 9.7.14.5.15 (ldmatrix, sm_75) and 9.7.14.5.16 (stmatrix, sm_90). Twin:
// tests/simt/include/cuda/ptx/ldmatrix.cuh.
//
// Lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned to 16). Afterwards register i of
// lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i; with _trans, of the transposed
// matrix. Reads what is ordered before it for the lane that gives the address. Every lane of the warp takes
// part.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

__device__ __forceinline__ void ldmatrix_x1(unsigned (&d)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1]) : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1]) : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}

// sm_90. The reverse of ldmatrix_x4.
__device__ __forceinline__ void stmatrix_x4(void* row, const unsigned (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(unsigned(__cvta_generic_to_shared(row))), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}
// Of ldmatrix_x2 and ldmatrix_x4_trans.
__device__ __forceinline__ void stmatrix_x2(void* row, const unsigned (&d)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
               ::"r"(unsigned(__cvta_generic_to_shared(row))), "r"(d[0]), "r"(d[1]) : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const unsigned (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(unsigned(__cvta_generic_to_shared(row))), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}

}  // namespace tilestream::ptx
