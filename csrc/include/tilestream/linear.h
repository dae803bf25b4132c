// y = x . W^T (+ bias) on packed weights, and the packing itself. What may follow in float32, before the one rounding to y:
//   + residual;
//   gate: the weight's rows alternate between those of gate and of up (2i and 2i + 1), y = act(gate) * up. Neighbours, for
//         every kernel then holds both in one thread.
//
// Packed formats (PackedFormat). N is padded to a multiple of 32 columns ("panel"); panels follow one
// another; within a panel K runs outermost, in groups of 32 (G32) or 128 (G128) consecutive k. A group is, for each 32 k,
//   U4: codes [2 halves of 16 columns][4 vectors][16 columns][4 bytes], where byte j = 4v + b of vector v has k = j
//       in its low nibble and k = 16 + j in its high one (GGUF's own order, and both operands of tensor cores have it);
//   U8: codes [2][8 vectors][16 columns][4 k];
// then scale float16 [32]; then, but for the symmetric formats (S), zero float16 [32].
//   weight = q * scale + zero;  S: zero = -8 * scale or -128 * scale.
// A last group of 128 holds only the codes that exist.
//   kBFloat16: [K/2][32][2] bfloat16 (K odd: the last pair's second element is 0).
//   kFloat32:  [K][32] float32.
// and, on a GPU only, what torch has, so that other libraries can multiply by the same memory:
//   kRowsBFloat16, kRowsFloat16: [N][K] without padding, K a multiple of 8.
// The group-quantised formats meet int8 activations (tilestream/quantise.h), so that a group's inner product is exact in
// int32. They are given as such, or as floats that the kernel quantises first, or that meet dequantised weights.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tilestream/activation.h"
#include "tilestream/quantise.h"

namespace tilestream {

enum class PackedFormat : int32_t {
  kFloat32 = 0, kBFloat16 = 1, kU4G32S = 2, kU4G32 = 3, kU8G32S = 4, kU8G32 = 5, kU4G128S = 6, kU4G128 = 7, kU8G128S = 8,
  kRowsBFloat16 = 9, kRowsFloat16 = 10
};
constexpr int kNumPackedFormats = 11;

// f(format as a std::integral_constant).
template <class F>
inline void with_format(PackedFormat format, F&& f) {
  switch (format) {
#define CASE(FORMAT) \
  case PackedFormat::FORMAT: return f(std::integral_constant<PackedFormat, PackedFormat::FORMAT>{});
    CASE(kFloat32) CASE(kBFloat16) CASE(kU4G32S) CASE(kU4G32) CASE(kU8G32S) CASE(kU8G32) CASE(kU4G128S)
    CASE(kU4G128) CASE(kU8G128S) CASE(kRowsBFloat16) CASE(kRowsFloat16)
#undef CASE
  }
}

constexpr int kPanelColumns = 32;

TILESTREAM_HOST_DEVICE constexpr bool is_quantised(PackedFormat f) {
  return f >= PackedFormat::kU4G32S && f <= PackedFormat::kU8G128S;
}
TILESTREAM_HOST_DEVICE constexpr bool is_row_major(PackedFormat f) { return f >= PackedFormat::kRowsBFloat16; }

TILESTREAM_HOST_DEVICE constexpr bool is_four_bit(PackedFormat f) {
  return f == PackedFormat::kU4G32S || f == PackedFormat::kU4G32 || f == PackedFormat::kU4G128S || f == PackedFormat::kU4G128;
}
TILESTREAM_HOST_DEVICE constexpr bool has_zero(PackedFormat f) {
  return f == PackedFormat::kU4G32 || f == PackedFormat::kU8G32 || f == PackedFormat::kU4G128;
}
// Consecutive k of a weight that share a scale and a zero.
TILESTREAM_HOST_DEVICE constexpr int group_k(PackedFormat f) {
  return f == PackedFormat::kU4G128S || f == PackedFormat::kU4G128 || f == PackedFormat::kU8G128S ? 128 : kGroupK;
}

// Bytes of one panel for a K (a multiple of 32 for the group-quantised formats); of 32 rows of a row-major weight.
TILESTREAM_HOST_DEVICE constexpr int64_t panel_bytes(PackedFormat f, int64_t k) {
  if (is_quantised(f)) {
    const int64_t codes = ceil_div(k, kGroupK) * kGroupK * kPanelColumns;  // at 8 bits
    return (is_four_bit(f) ? codes / 2 : codes) + ceil_div(k, group_k(f)) * kPanelColumns * (has_zero(f) ? 4 : 2);
  }
  return f == PackedFormat::kFloat32    ? k * kPanelColumns * 4
         : f == PackedFormat::kBFloat16 ? round_up(k, 2) * kPanelColumns * 2
                                        : k * kPanelColumns * 2;
}
constexpr int64_t packed_bytes(PackedFormat f, int64_t n, int64_t k) {
  return is_row_major(f) ? 2 * n * k : ceil_div(n, kPanelColumns) * panel_bytes(f, k);
}

// Where the parts of one group of one panel lie, in bytes.
template <PackedFormat F>
struct GroupLayout {
  static constexpr bool kFourBit = is_four_bit(F), kHasZero = has_zero(F);
  static constexpr int kOffset = kFourBit ? 8 : 128;       // code of the value 0 where no zeros are stored
  static constexpr int kHalfBytes = kFourBit ? 256 : 512;  // codes of 32 k of 16 columns
  static constexpr int kCodeBytes = 2 * kHalfBytes;        // codes of 32 k
  static constexpr int kParts = group_k(F) / kGroupK;      // of 32 k, in a whole group
  static constexpr int kScaleBytes = 2 * kPanelColumns;
  static constexpr int kScaleAt = kParts * kCodeBytes;     // of a whole group
  static constexpr int kZeroAt = kScaleAt + kScaleBytes;
  static constexpr int kBytes = kHasZero ? kZeroAt + kScaleBytes : kZeroAt;
  // Parts of 32 k that group g of a panel has; the scales follow them.
  TILESTREAM_HOST_DEVICE static constexpr int parts(int64_t k, int64_t g) {
    const int64_t left = k / kGroupK - g * kParts;
    return left < kParts ? int(left) : kParts;
  }
};

struct LinearParams {
  const void* x;       // [m, k], dtype; last dim contiguous; null where x_q is given
  QuantisedRows x_q;   // m rows, for the group-quantised formats; q null where x is given
  const void* weight;  // packed_bytes(format, n, k) bytes, 64-byte aligned
  const void* bias;    // [n] float32, or null
  const void* residual;  // [m, n], dtype; last dim contiguous; may be y; or null
  void* y;             // [m, n], with a gate [m, n / 2]; dtype; last dim contiguous
  int64_t m, n, k;
  int64_t x_row_stride, y_row_stride, residual_row_stride;
  DType dtype;         // of x, residual and y: float32, float16, bfloat16; the weight's own where that is row-major
  PackedFormat format;
  Activation gate = Activation::kNone;  // with one: n even, no residual
  bool gemv;           // row-major formats, whose x has rows at multiples of 16 bytes: without tensor cores, for few rows
  bool weight_only;    // group-quantised formats, x given: floats meet dequantised weights (W4A16, W8A16)
  void* workspace;     // cuda::workspace_bytes() bytes, 16-byte aligned; unused by the CPU backend
};

// GGUF block types this library reads (ggml's numbers).
enum class GgufType : int32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kBF16 = 30
};

// Packs rows of GGUF blocks. Q4_0 -> kU4G32S, Q4_1/Q4_K -> kU4G32, Q8_0 -> kU8G32S, Q5_K -> kU8G32,
// Q6_K -> kU8G32S (two groups of 16 share the larger scale; error at most 1/2 step of 8 bits), all without
// a float detour for the rest; F32/F16/BF16 -> kFloat32 or kBFloat16. Any type -> any float format dequantises.
struct PackGgufParams {
  const uint8_t* rows;  // [n, row_bytes] GGUF blocks
  int64_t row_bytes;
  void* packed;
  int64_t n, k;
  int64_t skip;         // leading weights of each row's first block that are none of the n x k, a multiple of 32
  int64_t panel_begin;  // first panel written: lets several tensors (q, k, v) share one packed weight, n % 32 == 0 each
  GgufType type;
  PackedFormat format;
};

// Packs already separated values: q uint8 [n, k] (0..15 or 0..255), scale/zero float32 [n, ceil(k / group)].
// For the float formats, `values` [n, k] float32 is packed instead.
struct PackParams {
  const float* values;
  const uint8_t* q;
  const float* scale;
  const float* zero;
  int64_t group;  // multiple of group_k(format); the last of a row may be shorter
  void* packed;
  int64_t n, k;
  PackedFormat format;
};

// Rows of a packed weight as float32 (embedding lookup; the tied lm_head shares the memory).
struct EmbeddingParams {
  const int64_t* ids;   // [num_tokens], checked by the caller
  const void* weight;
  void* y;              // [num_tokens, k], y_dtype
  int64_t num_tokens, n, k;
  DType y_dtype;
  PackedFormat format;
};

namespace cpu {
void linear(const LinearParams& params);
void pack_gguf(const PackGgufParams& params);
void pack_weight(const PackParams& params);
void embedding(const EmbeddingParams& params);
}  // namespace cpu

namespace cuda {
constexpr int kTileColumns = 128;  // columns of y of a block that divides K with others
constexpr int kSlices = 8;         // parts of K at most

// Blocks among which K is divided for row-major weights, where an H200's 132 SMs would else have too little to do.
inline int num_slices(const LinearParams& p) {
  constexpr int64_t kSms = 132, kLeastK = 512;
  const int64_t tiles = ceil_div(p.n, kTileColumns);
  if (!(is_row_major(p.format) || p.weight_only) || p.gemv) return 1;
  return int(std::clamp<int64_t>(std::min(2 * kSms / tiles, ceil_div(p.k, kLeastK)), 1, kSlices));
}

// For group-quantised weights the last tiles, of at most 128 rows, may have a block for each slice. A row's bits are the same.
constexpr int kMostSharedTiles = 64;
inline int64_t most_shared_columns(const LinearParams& p) {
  if (!is_quantised(p.format) || p.m <= 8) return 0;
  return std::min(round_up(p.n, kPanelColumns), kTileColumns * (kMostSharedTiles / ceil_div(p.m, 128) + 2));
}

// Hopper's linears on groups of 128 (linear_sm90.cu). Blocks of 64 columns by all of K; or for many rows of 256 columns by 128
// rows, where those are a third of the SMs' number at least, and y takes pairs of elements or a gate leaves one of two.
constexpr int64_t kSm90Sms = 132, kSm90WideBytes = 4 * 128 * 256;
inline bool sm90_is_wide(const LinearParams& p) {
  const bool takes_pairs =
      p.n % 2 == 0 && p.y_row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.y) % dtype_bytes(p.dtype, 2) == 0;
  return p.m > 64 && ceil_div(p.m, 128) * ceil_div(p.n, 256) >= kSm90Sms / 3 && (takes_pairs || p.gate != Activation::kNone);
}
// Slices of K with a sum each, where 64 columns a block are not two blocks for each SM. Of n and k alone: a row's bits do not
// depend on m.
inline int sm90_slices(int64_t n, int64_t k) {
  const int64_t most = std::min(2 * 64 * kSm90Sms / n, k / 256);
  return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}
// Sums of slices, or a place for each wide block's.
inline int64_t sm90_partial_bytes(const LinearParams& p) {
  if (!is_quantised(p.format) || group_k(p.format) == kGroupK || sm90_slices(p.n, p.k) == 1) return 0;
  return sm90_is_wide(p) ? kSm90Sms * kSm90WideBytes : 4 * sm90_slices(p.n, p.k) * p.m * round_up(p.n, kPanelColumns);
}

// Their sums, [slices][m][columns, to a multiple of 32] float32; then rows that the kernel has to quantise itself.
inline int64_t partial_bytes(const LinearParams& p) {
  if (is_quantised(p.format) && !p.weight_only) {
    return std::max(4 * kSlices * p.m * most_shared_columns(p), sm90_partial_bytes(p));
  }
  return num_slices(p) == 1 ? 0 : 4 * num_slices(p) * p.m * round_up(p.n, kPanelColumns);
}
inline int64_t workspace_bytes(const LinearParams& p) {
  return partial_bytes(p) + (is_quantised(p.format) && !p.weight_only && p.x_q.q == nullptr ? quantised_bytes(p.m, p.k) : 0);
}
void linear(const LinearParams& params, Stream stream);
void embedding(const EmbeddingParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
