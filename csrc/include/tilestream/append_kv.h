// Rotary embedding of q and k, and the write of k and v into a paged cache, in one pass.
#pragma once

#include "tilestream/types.h"

namespace tilestream {

struct AppendKvParams {
  void* q;                // [num_tokens, num_qo_heads, head_dim_qk], x_dtype, rotated in place; or null
  const void* k;          // [num_tokens, num_kv_heads, head_dim_qk], x_dtype
  const void* v;          // [num_tokens, num_kv_heads, head_dim_vo], x_dtype
  const float* cos_sin;   // [max_position, rotary_dim]: cos in the first half, sin in the second; or null: no RoPE
  const int32_t* positions;     // [num_tokens], < max_position
  const int32_t* slot_mapping;  // [num_tokens], page * page_size + offset; -1: rotate q, write nothing
  void* k_cache;          // as in AttentionParams
  void* v_cache;
  void* kv_scales;        // float16 [num_pages, 2, num_kv_heads, page_size, 2]; int8/int4 only
  float* key_stats;       // [num_pages, num_kv_heads, 2 (min, max), head_dim_qk] of the rotated keys, or null;
                          // offset 0 of a page starts its statistics afresh; in a call that writes it, the page's
                          // other tokens follow it in slot order
  // Keys rounded with feedback, int4 only; or all null: every element to the nearest. From a rotated key of head h
  // key_offset[h] is taken. Scale and zero are found as ever; then elements c = key_order[h][0], [1], ... are rounded in
  // turn, all in float32:
  //     code = clamp(rint((x[c] - zero) / scale), 0, 15);   e = x[c] - fma(code, scale, zero)
  //     x[key_order[h][j]] = fma(-e, key_feedback[h][i][j], x[key_order[h][j]])    for j > i, c being the i-th
  // (scale 0: divided by 1.) So every sum is made in the order of i.
  const float* key_offset;    // [num_kv_heads, head_dim_qk]
  const int32_t* key_order;   // [num_kv_heads, head_dim_qk], a permutation of each head's elements
  const float* key_feedback;  // [num_kv_heads, head_dim_qk, head_dim_qk]
  float k_scale, v_scale;       // k / k_scale and v / v_scale are what is stored (types.h)
  int64_t num_tokens;
  int32_t num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, rotary_dim, page_size;
  bool interleaved;       // true: GPT-J pairs (2i, 2i+1); false: NeoX halves
  DType x_dtype;
  KvDType kv_dtype;
  KvLayout kv_layout;
  int64_t q_token_stride, q_head_stride, k_in_token_stride, k_in_head_stride, v_in_token_stride, v_in_head_stride;
  int64_t k_page_stride, k_head_stride, k_token_stride;
  int64_t v_page_stride, v_head_stride, v_token_stride;
};

// The inverse view: rows of a (possibly blocked, possibly quantised) cache as plain float32 tensors.
struct GatherKvParams {
  const void* k_cache;
  const void* v_cache;
  const void* kv_scales;
  const int32_t* slot_mapping;  // [num_tokens]
  float* k;                     // [num_tokens, num_kv_heads, head_dim_qk]
  float* v;                     // [num_tokens, num_kv_heads, head_dim_vo]
  float k_scale, v_scale;
  int64_t num_tokens;
  int32_t num_kv_heads, head_dim_qk, head_dim_vo, page_size;
  KvDType kv_dtype;
  KvLayout kv_layout;
  int64_t k_page_stride, k_head_stride, k_token_stride;
  int64_t v_page_stride, v_head_stride, v_token_stride;
};

namespace cpu {
void append_kv(const AppendKvParams& params);
void gather_kv(const GatherKvParams& params);
}  // namespace cpu

namespace cuda {
void append_kv(const AppendKvParams& params, Stream stream);
void gather_kv(const GatherKvParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
