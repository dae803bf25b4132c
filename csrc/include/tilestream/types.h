// Element types, quantised-weight formats and small integer helpers shared by every backend.
// No torch, no CUDA: host and device code include this.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TILESTREAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TILESTREAM_HOST_DEVICE inline
#endif

struct CUstream_st;  // CUDA's, so that no CUDA header is needed to hold a stream

namespace tilestream {

using Stream = CUstream_st*;  // of a GPU; null is the default stream

// Element type of a tensor handed to a kernel.
// kFloat8E4M3: torch.float8_e4m3fn, whose largest value is 448 and which has no infinity.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3, kUInt4 = 4, kFloat8E4M3 = 5 };

// What a KV cache stores. Int8 and int4 are asymmetric: value = q * scale + zero, one (scale, zero)
// pair of float16 per token, kv head and side (K or V). Float8: value = stored * scale, one float for all of K (k_scale)
// and one for all of V (v_scale), which are 1 for every other dtype.
using KvDType = DType;

// How a page is laid out in memory.
//   kStrided: k_cache[page, kv_head, offset, d] through strides (HND, NHD, any view); last dim contiguous.
//   kBlocked: the CPU's own order, chosen so that the inner loops need no horizontal sum. A page of one
//             kv head is page_size / 16 blocks of 16 tokens, each block contiguous:
//       bfloat16:          K [head_dim / 2][16][2]   V [8][head_dim][2]   (pairs along the reduced axis)
//       float32, float16:  K [head_dim][16]          V [16][head_dim]
//       int8, float8:      K [head_dim / 4][16][4]   V [4][head_dim][4]    (quads: one integer dot product)
//       int4:              K [head_dim / 8][16][4]   V [2][head_dim][4]    (of eight neighbours along the reduced
//                          axis, byte i holds value i in the low nibble and value i + 4 in the high one)
//     page stride and head stride are those of the tensor; the shape is the same as for HND.
enum class KvLayout : int32_t { kStrided = 0, kBlocked = 1 };

constexpr int kKvBlockTokens = 16;  // tokens in one block of KvLayout::kBlocked

// Bytes of `num` elements of type `dtype` (num even for kUInt4).
TILESTREAM_HOST_DEVICE constexpr int64_t dtype_bytes(DType dtype, int64_t num) {
  return dtype == DType::kFloat32 ? 4 * num
         : dtype == DType::kUInt8 || dtype == DType::kFloat8E4M3 ? num
         : dtype == DType::kUInt4 ? num / 2
                                  : 2 * num;
}

TILESTREAM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TILESTREAM_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace tilestream
