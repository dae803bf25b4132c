// wgmma: d (+)= a * b by the four warps of a warpgroup, asynchronously; m = 64 rows. PTX ISA 9.7.15, sm_90a.
// Twin: tests/simt/include/cuda/ptx/wgmma.cuh.
//
// d has n / 2 registers. With w = warp % 4, g = lane / 4 and t = lane % 4, d[4 j + 2 i + e] is row 16 w + g +
// 8 i, column 8 j + 2 t + e. `a` from registers: each warp holds its 16 rows as for mma.sync (mma.cuh). `b`,
// and `a` from shared memory, are descriptors. All 128 threads issue the same instruction with the same
// descriptors. accumulate = false: d = a * b.
//
// Order, all by every thread of the warpgroup:
//   wgmma_fence(registers...)   before the first wgmma of a group
//   wgmma_...(d, a, b, ...)     any number; those with the same d follow each other without a fence
//   wgmma_commit_group()        those since the last commit become one group
//   wgmma_wait_group<n>(d...)   at most n groups are under way; those before have given back what they use
// Shared memory is read through the async proxy: data of ordinary stores needs fence_proxy_async and a
// barrier; data of TMA needs the wait on its mbarrier alone.
#pragma once

#include "cuda/ptx/swizzle.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Which index of a tile is contiguous in shared memory. kMN only for 16-bit elements.
enum class Major : int { kK = 0, kMN = 1 };

// Describes a tile in shared memory (PTX ISA 9.7.15.5.1.2.2, "Matrix Descriptor Format"). Its parts have rows
// of swizzle_bytes(swizzle) and come in groups of 8 rows, contiguous:
//   kK:   row = row of a, or column of b; one wgmma reads 32 bytes of each, the next starts 32 bytes on.
//         stride_bytes: from 8 rows to the next 8.
//         leading_bytes: for kNone alone, from the first 16 bytes along k to the second.
//   kMN:  row = one k. stride_bytes: from 8 k to the next 8.
//         leading_bytes: from swizzle_bytes along m or n to the next. For kNone the two change places.
// The tile begins where the pattern of the swizzle does (8 rows aligned); start addresses inside it are
// multiples of 16.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, Swizzle swizzle, unsigned stride_bytes,
                                                     unsigned leading_bytes = 0) {
  const unsigned address = unsigned(__cvta_generic_to_shared(tile));
  const uint64_t layout = (4 - int(swizzle)) & 3;  // 1, 2, 3: of 128, 64, 32 bytes
  const uint64_t leading = leading_bytes >> 4, stride = stride_bytes >> 4;
  return (address & 0x3ffff) >> 4 | leading << 16 | stride << 32 | layout << 62;
}
// The same tile from `bytes` further on. The address has 14 bits of the lower word: nothing is carried out of it.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, unsigned bytes) {
  return (descriptor & 0xffffffff00000000) | (unsigned(descriptor) + (bytes >> 4));
}

// Ties registers to the place among volatile instructions where this stands: the compiler sees no other
// reason not to move their uses across a fence or a wait.
template <int kNum>
__device__ __forceinline__ void pin(float (&registers)[kNum]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <class T, int kNum>
__device__ __forceinline__ void pin(T (&registers)[kNum]) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <class T, int kFragments, int kNum>
__device__ __forceinline__ void pin(T (&fragments)[kFragments][kNum]) {
#pragma unroll
  for (int i = 0; i < kFragments; ++i) pin(fragments[i]);
}

// Orders this warp's accesses to registers before those of the wgmmas behind it. Name the arrays that those
// use.
template <class... Arrays>
__device__ __forceinline__ void wgmma_fence(Arrays&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Name the accumulators of the groups that this waits for.
template <int kPending, class... Arrays>
__device__ __forceinline__ void wgmma_wait_group(Arrays&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin(registers), ...);
}

// ---- the instruction, for n of TILESTREAM_WGMMA_SHAPES

// Placeholders %0 to %(NUM - 1), and the registers d[0] to d[NUM - 1] in their place.
#define TILESTREAM_L4 "%0, %1, %2, %3"
#define TILESTREAM_L8 TILESTREAM_L4 ", %4, %5, %6, %7"
#define TILESTREAM_L16 TILESTREAM_L8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TILESTREAM_L32 TILESTREAM_L16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TILESTREAM_L40 TILESTREAM_L32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TILESTREAM_L48 TILESTREAM_L40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TILESTREAM_L56 TILESTREAM_L48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TILESTREAM_L64 TILESTREAM_L56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TILESTREAM_L80 TILESTREAM_L64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TILESTREAM_L88 TILESTREAM_L80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TILESTREAM_L96 TILESTREAM_L88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TILESTREAM_L128 TILESTREAM_L96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TILESTREAM_D4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define TILESTREAM_D8(C, i) TILESTREAM_D4(C, i), TILESTREAM_D4(C, i + 4)
#define TILESTREAM_D16(C, i) TILESTREAM_D8(C, i), TILESTREAM_D8(C, i + 8)
#define TILESTREAM_D32(C, i) TILESTREAM_D16(C, i), TILESTREAM_D16(C, i + 16)
#define TILESTREAM_D40(C, i) TILESTREAM_D32(C, i), TILESTREAM_D8(C, i + 32)
#define TILESTREAM_D48(C, i) TILESTREAM_D32(C, i), TILESTREAM_D16(C, i + 32)
#define TILESTREAM_D56(C, i) TILESTREAM_D40(C, i), TILESTREAM_D16(C, i + 40)
#define TILESTREAM_D64(C, i) TILESTREAM_D32(C, i), TILESTREAM_D32(C, i + 32)
#define TILESTREAM_D80(C, i) TILESTREAM_D64(C, i), TILESTREAM_D16(C, i + 64)
#define TILESTREAM_D88(C, i) TILESTREAM_D80(C, i), TILESTREAM_D8(C, i + 80)
#define TILESTREAM_D96(C, i) TILESTREAM_D64(C, i), TILESTREAM_D32(C, i + 64)
#define TILESTREAM_D128(C, i) TILESTREAM_D64(C, i), TILESTREAM_D64(C, i + 64)

// X(registers of d, n, the numbers of the operands behind d, forms' own arguments). Head dims, KV tiles and
// token tiles; the ISA has every multiple of 8 (of 16 from 32 on for s8).
#define TILESTREAM_WGMMA_SHAPES(X, ...)                        \
  X(4, 8, 4, 5, 6, 7, 8, 9, 10, __VA_ARGS__)                   \
  X(8, 16, 8, 9, 10, 11, 12, 13, 14, __VA_ARGS__)              \
  X(16, 32, 16, 17, 18, 19, 20, 21, 22, __VA_ARGS__)           \
  X(32, 64, 32, 33, 34, 35, 36, 37, 38, __VA_ARGS__)           \
  X(40, 80, 40, 41, 42, 43, 44, 45, 46, __VA_ARGS__)           \
  X(48, 96, 48, 49, 50, 51, 52, 53, 54, __VA_ARGS__)           \
  X(56, 112, 56, 57, 58, 59, 60, 61, 62, __VA_ARGS__)          \
  X(64, 128, 64, 65, 66, 67, 68, 69, 70, __VA_ARGS__)          \
  X(80, 160, 80, 81, 82, 83, 84, 85, 86, __VA_ARGS__)          \
  X(88, 176, 88, 89, 90, 91, 92, 93, 94, __VA_ARGS__)          \
  X(96, 192, 96, 97, 98, 99, 100, 101, 102, __VA_ARGS__)       \
  X(128, 256, 128, 129, 130, 131, 132, 133, 134, __VA_ARGS__)

// What follows the operands: 1, 1: neither a nor b negated; then what is transposed. `p` of s8 stands alone.
#define TILESTREAM_TAIL16_SS(TA, TB) ", 1, 1, %" #TA ", %" #TB
#define TILESTREAM_TAIL16_RS(TB) ", 1, 1, %" #TB
#define TILESTREAM_TAIL8F_SS(TA, TB) ", 1, 1"
#define TILESTREAM_TAIL8F_RS(TB) ", 1, 1"
#define TILESTREAM_TAIL8I_SS(TA, TB) ""
#define TILESTREAM_TAIL8I_RS(TB) ""

#define TILESTREAM_WGMMA_SS(NUM, N, A, B, ACCUMULATE, TA, TB, O5, O6, C, K, TYPES, TAIL)                     \
  else if constexpr (kNum == NUM)                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k" #K TYPES " {" TILESTREAM_L##NUM "}, "            \
                 "%" #A ", %" #B ", p" TILESTREAM_##TAIL##_SS(TA, TB) "; }"                                  \
                 : TILESTREAM_D##NUM(C, 0)                                                                   \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMajorA)), "n"(int(kMajorB)));

#define TILESTREAM_WGMMA_RS(NUM, N, A0, A1, A2, A3, B, ACCUMULATE, TB, C, K, TYPES, TAIL)                    \
  else if constexpr (kNum == NUM)                                                                            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0;\n"                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k" #K TYPES " {" TILESTREAM_L##NUM "}, "            \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p" TILESTREAM_##TAIL##_RS(TB) "; }"     \
                 : TILESTREAM_D##NUM(C, 0)                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),                 \
                   "n"(int(kMajorB)));

#define TILESTREAM_WGMMA(NAME, D, C, K, TYPES, TAIL)                                                         \
  template <Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kNum>                                  \
  __device__ __forceinline__ void NAME(D (&d)[kNum], uint64_t a, uint64_t b, bool accumulate) {              \
    if constexpr (K == 32 && (kMajorA == Major::kMN || kMajorB == Major::kMN))                               \
      static_assert(kNum == 0, "8-bit tiles are K-major");                                                   \
    TILESTREAM_WGMMA_SHAPES(TILESTREAM_WGMMA_SS, C, K, TYPES, TAIL)                                          \
    else static_assert(kNum == 0, "not in TILESTREAM_WGMMA_SHAPES: d must have n / 2 registers");            \
  }                                                                                                          \
  template <Major kMajorB = Major::kK, int kNum>                                                             \
  __device__ __forceinline__ void NAME(D (&d)[kNum], const unsigned (&a)[4], uint64_t b, bool accumulate) {  \
    if constexpr (K == 32 && kMajorB == Major::kMN) static_assert(kNum == 0, "8-bit tiles are K-major");     \
    TILESTREAM_WGMMA_SHAPES(TILESTREAM_WGMMA_RS, C, K, TYPES, TAIL)                                          \
    else static_assert(kNum == 0, "not in TILESTREAM_WGMMA_SHAPES: d must have n / 2 registers");            \
  }

TILESTREAM_WGMMA(wgmma_m64k16_f16, float, "+f", 16, ".f32.f16.f16", TAIL16)
TILESTREAM_WGMMA(wgmma_m64k16_bf16, float, "+f", 16, ".f32.bf16.bf16", TAIL16)
TILESTREAM_WGMMA(wgmma_m64k32_e4m3, float, "+f", 32, ".f32.e4m3.e4m3", TAIL8F)
TILESTREAM_WGMMA(wgmma_m64k32_s8, int, "+r", 32, ".s32.s8.s8", TAIL8I)

}  // namespace tilestream::ptx
