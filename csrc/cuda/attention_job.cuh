// What the attention kernels share: a job's rows, what each of them sees, logits, and how results are written.
#pragma once

#include "cuda/common/kv_cache.cuh"
#include "cuda/ptx/math.cuh"
#include "tilestream/attention.h"

namespace tilestream::cuda {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kFloatMax = 3.402823466e38f;

// What turns a product q . k into a base-2 logit: s * scale, or cap * tanh(s * cap_scale), plus ALiBi. The sign of
// sm_scale is folded into q, so that scale is positive and the largest product is the largest logit.
struct LogitRule {
  float scale, cap_scale, q_sign;  // cap_scale 0: no soft cap, else scale multiplies the tanh
  bool alibi;
  // What still multiplies a logit that logit() has seen, to take it to base 2. It comes last, after the maximum has been
  // subtracted: what rounds is then a distance, small where the weight is large.
  __device__ __forceinline__ float to_log2() const { return alibi ? 1.0f : scale; }
  // For products that are `factor` times as large.
  __device__ __forceinline__ LogitRule times(float factor) const {
    return {cap_scale == 0.0f ? scale * factor : scale, cap_scale * factor, q_sign, alibi};
  }
};

inline LogitRule make_logit_rule(const AttentionParams& p) {
  const float magnitude = fabsf(p.sm_scale);
  LogitRule rule{magnitude * kLog2E, 0.0f, float(p.sm_scale > 0) - float(p.sm_scale < 0), p.alibi_slopes != nullptr};
  if (magnitude == 0.0f) rule.scale = kLog2E;  // q is multiplied by 0
  else if (p.logits_soft_cap > 0.0f) rule.scale = p.logits_soft_cap * kLog2E, rule.cap_scale = magnitude / p.logits_soft_cap;
  return rule;
}

__device__ __forceinline__ float capped(float s, const LogitRule& rule) { return tanhf(s * rule.cap_scale); }
// distance: key position - query position. slope_log2: of ALiBi.
__device__ __forceinline__ float with_alibi(float s, const LogitRule& rule, float slope_log2, int distance) {
  return fmaf(s, rule.scale, slope_log2 * float(distance));
}
__device__ __forceinline__ float logit(float s, const LogitRule& rule, float slope_log2, int distance) {
  if (rule.cap_scale != 0.0f) s = capped(s, rule);
  return rule.alibi ? with_alibi(s, rule, slope_log2, distance) : s;
}

// A job and what of the launch concerns it. One for the block, in shared memory: registers are for accumulators.
struct Job {
  PlanJob at;
  const int32_t* tokens;
  const int32_t* pages;  // of its list
  int group_size, num_rows, num_kv_heads, page_size, page_shift, window_left;
  bool causal;

  __device__ __forceinline__ void load(const AttentionParams& p, int index) {
    const PlanHeader& h = p.plan.header();
    at = p.plan.jobs()[index];
    tokens = p.plan.q_rows() + at.q_rows_begin;
    pages = p.block_table + at.page_list * p.block_table_stride;
    num_kv_heads = h.num_kv_heads, page_size = h.page_size, page_shift = __ffs(page_size) - 1;
    group_size = h.num_qo_heads / num_kv_heads, num_rows = at.num_q_tokens * group_size;
    const bool masks = at.q_pos_begin != kAllVisible;
    causal = masks && h.causal != 0, window_left = masks ? h.window_left : -1;
  }

  __device__ __forceinline__ int token(int row) const { return tokens[row / group_size]; }
  __device__ __forceinline__ int head(int row) const { return at.kv_head * group_size + row % group_size; }
  __device__ __forceinline__ int q_pos(int row) const { return at.q_pos_begin + row / group_size; }
  // Keys begin <= j < end that a row sees.
  __device__ __forceinline__ int keys_begin(int row) const {
    return window_left >= 0 ? max(at.kv_begin, q_pos(row) - window_left) : at.kv_begin;
  }
  __device__ __forceinline__ int keys_end(int row) const { return causal ? min(at.kv_end, q_pos(row) + 1) : at.kv_end; }
  // Of a key's own position in the cache.
  __device__ __forceinline__ int64_t page(int key) const { return pages[key >> page_shift]; }
  __device__ __forceinline__ int offset(int key) const { return key & (page_size - 1); }
};

// The keys that one row sees, and its ALiBi slope. A row past the job's end sees nothing.
struct RowView {
  int begin, end, q_pos;
  float slope_log2;

  __device__ __forceinline__ RowView(const AttentionParams& p, const Job& job, int row)
      : begin(0), end(0), q_pos(0), slope_log2(0) {
    if (row >= job.num_rows) return;
    begin = job.keys_begin(row), end = job.keys_end(row), q_pos = job.q_pos(row);
    if (p.alibi_slopes != nullptr) slope_log2 = p.alibi_slopes[job.head(row)] * kLog2E;
  }
  __device__ __forceinline__ bool sees(int key) const { return key >= begin && key < end; }
};

// The element d of q or out, whatever its dtype. Read and written once per job.
__device__ __forceinline__ float load_element(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}
__device__ __forceinline__ void store_element(DType dtype, void* p, int64_t i, float v) {
  if (dtype == DType::kFloat32) static_cast<float*>(p)[i] = v;
  else if (dtype == DType::kFloat16) static_cast<__half*>(p)[i] = from_float<__half>(v);
  else static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
}
__device__ __forceinline__ float load_q(const AttentionParams& p, int64_t token, int head, int d, float sign) {
  return load_element(p.q_dtype, p.q, token * p.q_token_stride + head * p.q_head_stride + d) * sign;
}

// Eight neighbours of q or out. is_aligned: they begin at a multiple of 16 bytes.
struct Floats8 { float at[8]; };
template <class Q>
__device__ __forceinline__ Floats8 load_floats(const void* p, int64_t begin, bool is_aligned) {
  Floats8 floats;
#pragma unroll
  for (int k = 0; k < 8; k += Vec<Q>::kSize) {
    const Q* const from = static_cast<const Q*>(p) + begin + k;
    const Vec<Q> v = is_aligned ? load_vec<true>(from, Vec<Q>::kSize) : load_vec<false>(from, Vec<Q>::kSize);
#pragma unroll
    for (int j = 0; j < Vec<Q>::kSize; ++j) floats.at[k + j] = to_float(v.at[j]);
  }
  return floats;
}
template <class Q>
__device__ __forceinline__ void store_floats(void* p, int64_t begin, const Floats8& floats, bool is_aligned) {
#pragma unroll
  for (int k = 0; k < 8; k += Vec<Q>::kSize) {
    Q* const to = static_cast<Q*>(p) + begin + k;
    Vec<Q> v;
#pragma unroll
    for (int j = 0; j < Vec<Q>::kSize; ++j) v.at[j] = from_float<Q>(floats.at[k + j]);
    if (is_aligned) store_vec<true>(to, v, Vec<Q>::kSize);
    else store_vec<false>(to, v, Vec<Q>::kSize);
  }
}

// A row's partial results, in the workspace: outputs of all rows, then their base-2 log-sum-exps.
struct Partials {
  float* out;
  float* lse_log2;

  __device__ __forceinline__ explicit Partials(const AttentionParams& p)
      : out(p.workspace),
        lse_log2(p.workspace + int64_t(p.plan.header().num_partial_rows) *
                                   (p.plan.header().num_qo_heads / p.plan.header().num_kv_heads) * p.head_dim_vo) {}
};

// Weight exp2(lse - max) of a part in a sum; 0 of an empty one.
__device__ __forceinline__ float part_weight(float lse_log2, float max_log2) {
  return lse_log2 == -INFINITY ? 0.0f : exp2f(lse_log2 - max_log2);
}
__device__ __forceinline__ float larger_or_nan(float a, float b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float sink_log2(const AttentionParams& p, int head) {
  return p.sinks != nullptr ? p.sinks[head] * kLog2E : -INFINITY;
}
__device__ __forceinline__ void store_lse(const AttentionParams& p, int token, int head, float max_log2, float denominator) {
  if (p.lse == nullptr) return;
  p.lse[int64_t(token) * p.plan.header().num_qo_heads + head] =
      denominator == 0.0f ? -INFINITY : (max_log2 + log2f(denominator)) * kLn2;
}

// Calls run() for every job of this block's workers, with `job` in shared memory. All threads take part.
template <class Run>
__device__ __forceinline__ void walk_jobs(const AttentionParams& p, Job& job, Run run) {
  for (int worker = blockIdx.x; worker < p.plan.header().num_workers; worker += gridDim.x) {
    for (int j = p.plan.worker_begin()[worker]; j < p.plan.worker_begin()[worker + 1]; ++j) {
      __syncthreads();  // nobody needs the job before any more
      if (threadIdx.x == 0) job.load(p, j);
      __syncthreads();
      run();
    }
  }
}

// Where a row's normalised output goes: to its partial row, or, with the sink's share of the weight, to the final output,
// by the arithmetic that merges a single part.
class RowWriter {
 public:
  // lanes that are not `first` write outputs only
  __device__ __forceinline__ RowWriter(const AttentionParams& p, const Job& job, int row, float lse_log2, bool first)
      : p_(p), is_partial_(job.at.partial_begin >= 0) {
    if (is_partial_) {
      const Partials partials(p);
      const int64_t at = int64_t(job.at.partial_begin) * job.group_size + row;
      partial_ = partials.out + at * p.head_dim_vo;
      if (first) partials.lse_log2[at] = lse_log2;
      return;
    }
    const int token = job.token(row), head = job.head(row);
    begin_ = token * p.out_token_stride + head * p.out_head_stride;
    const float sink = sink_log2(p, head), most = larger_or_nan(sink, lse_log2);
    weight_ = part_weight(lse_log2, most);
    const float denominator = part_weight(sink, most) + weight_;
    scale_ = p.out_scale(job.at.kv_head) / (denominator == 0.0f ? 1.0f : denominator);
    if (first) store_lse(p, token, head, most, denominator);
  }
  __device__ __forceinline__ void store(int d, float v) const {
    if (is_partial_) partial_[d] = v;
    else store_element(p_.out_dtype, p_.out, begin_ + d, v * weight_ * scale_);
  }
  // Columns d to d + 7, d a multiple of 8.
  __device__ __forceinline__ void store_8(int d, const Floats8& v) const {
    if (is_partial_) return store_floats<float>(partial_, d, v, true);
    Floats8 out;
#pragma unroll
    for (int k = 0; k < 8; ++k) out.at[k] = v.at[k] * weight_ * scale_;
    const bool is_aligned = rows_aligned(p_.out, dtype_bytes(p_.out_dtype, 1), p_.out_token_stride, p_.out_head_stride);
    if (p_.out_dtype == DType::kFloat32) store_floats<float>(p_.out, begin_ + d, out, is_aligned);
    else if (p_.out_dtype == DType::kFloat16) store_floats<__half>(p_.out, begin_ + d, out, is_aligned);
    else store_floats<__nv_bfloat16>(p_.out, begin_ + d, out, is_aligned);
  }

 private:
  const AttentionParams& p_;
  const bool is_partial_;
  float* partial_ = nullptr;
  int64_t begin_ = 0;
  float weight_ = 1.0f, scale_ = 1.0f;
};

}  // namespace tilestream::cuda
