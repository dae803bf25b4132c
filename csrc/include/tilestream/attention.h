// Paged variable-length attention run from a plan.
//   out[t, h] = softmax(mask(cap(sm_scale * q[t, h] . K[h / group_size]) + alibi)) . V[h / group_size]
// Layout, masks and job semantics: plan.h. One launch covers prefill, decode, mixed and shared-prefix work.
#pragma once

#include "tilestream/plan.h"
#include "tilestream/types.h"

namespace tilestream {

struct AttentionParams {
  const void* q;          // [num_tokens, num_qo_heads, head_dim_qk], q_dtype; last dim contiguous
  void* out;              // [num_tokens, num_qo_heads, head_dim_vo], out_dtype; last dim contiguous
  float* lse;             // [num_tokens, num_qo_heads], natural log, or null
  const void* k_cache;    // [num_pages, num_kv_heads, page_size, head_dim_qk] through strides, kv_dtype
  const void* v_cache;    // [num_pages, num_kv_heads, page_size, head_dim_vo] through strides, kv_dtype
  const void* kv_scales;  // float16 [num_pages, 2, num_kv_heads, page_size, 2] (scale, zero); int8/int4 only
  const int32_t* block_table;  // [lists, max_pages_per_seq]; row stride below
  const float* alibi_slopes;   // [num_qo_heads] or null: adds slope * (key position - query position)
  const float* sinks;          // [num_qo_heads] or null: exp(sink) joins the denominator (and the lse)
  const float *q_descale, *k_descale, *v_descale;  // [num_kv_heads] or null: what a float8 q, K, V stores is multiplied by it
  float* workspace;            // plan_workspace_floats() floats
  PlanView plan;
  // Of the plan's header, the same for all plans of a planner:
  bool merge_inside;             // it has merge information: a kernel may merge in the launch that computes the parts
  int32_t num_lists, num_wide_lists;  // of jobs, and how many of them, the first, are not narrow

  int32_t head_dim_qk, head_dim_vo;
  int32_t num_pages, num_kv_heads, page_size;
  DType q_dtype, out_dtype;  // the same but for a float8 q, which a float8 cache alone allows
  KvDType kv_dtype;
  KvLayout kv_layout;
  float sm_scale;         // k_scale of a float8 cache included
  float v_scale;          // out is multiplied by it
  float logits_soft_cap;  // 0: off; s <- cap * tanh(s / cap) after sm_scale, before masks
  float unified_max;      // about the largest logit of a row, where a decode need not look for it; NaN: unknown

  // In elements; for kUInt4 in bytes. token stride is unused when kv_layout is kBlocked.
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  int64_t k_page_stride, k_head_stride, k_token_stride;
  int64_t v_page_stride, v_head_stride, v_token_stride;
  int64_t block_table_stride;

  // What scores and outputs of a kv head are multiplied by.
  TILESTREAM_HOST_DEVICE float score_descale(int kv_head) const {
    return (q_descale != nullptr ? q_descale[kv_head] : 1.0f) * (k_descale != nullptr ? k_descale[kv_head] : 1.0f);
  }
  TILESTREAM_HOST_DEVICE float out_scale(int kv_head) const {
    return v_descale != nullptr ? v_scale * v_descale[kv_head] : v_scale;
  }
};

// out[n, h] = sum_s w_s v[n, s, h] / sum_s w_s, w_s = exp(lse[n, s, h] - max_s); lse' = log sum exp.
// States with lse = -inf weigh nothing, whatever v holds; all empty gives out = 0, lse = -inf.
struct MergeStatesParams {
  const void* v;      // [num_tokens, num_states, num_heads, head_dim], contiguous, dtype
  const float* lse;   // [num_tokens, num_states, num_heads], natural log
  void* out;          // [num_tokens, num_heads, head_dim], dtype
  float* out_lse;     // [num_tokens, num_heads]
  int64_t num_tokens;
  int32_t num_states, num_heads, head_dim;
  DType dtype;
};

namespace cpu {
void attention(const AttentionParams& params);
void merge_states(const MergeStatesParams& params);
}  // namespace cpu

namespace cuda {
void attention(const AttentionParams& params, Stream stream);
void merge_states(const MergeStatesParams& params, Stream stream);
}  // namespace cuda

}  // namespace tilestream
