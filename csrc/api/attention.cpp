// tilestream::attention and tilestream::merge_states: tensors -> checks -> params -> backend.
#include "tilestream/attention.h"

#include <torch/library.h>

#include <cmath>
#include <limits>

#include "api/kv_cache.h"
#include "api/launch.h"
#include "api/one_device.h"

namespace tilestream::api {
namespace {

// Everything is read from host_plan: plan, the kernel's, may be on a GPU.
void check_plan(const at::Tensor& plan, const at::Tensor& host_plan, const at::Tensor& q, const at::Tensor& block_table,
                const KvCacheArgs& cache) {
  check_tensor(plan, "plan", {at::kInt}, 1);
  check_tensor(host_plan, "host_plan", {at::kInt}, 1);
  TORCH_CHECK_VALUE(host_plan.is_cpu(), "host_plan is on ", host_plan.device(), "; it must be on the CPU");
  TORCH_CHECK_VALUE(host_plan.numel() >= int64_t(sizeof(PlanHeader) / 4), "host_plan has ", host_plan.numel(),
                    " elements; a plan of tilestream starts with a header of ", sizeof(PlanHeader) / 4);
  const PlanHeader& h = PlanView{host_plan.const_data_ptr<int32_t>()}.header();
  TORCH_CHECK_VALUE(h.magic == kPlanMagic && h.total_int32 <= host_plan.numel(),
                    "host_plan does not hold a plan of this version of tilestream");
  TORCH_CHECK_VALUE(h.total_int32 <= plan.numel(), "plan has ", plan.numel(), " elements; this plan has ", h.total_int32);
  // More rows than the plan has tokens: a captured graph runs with fewer requests than it was captured for.
  TORCH_CHECK_VALUE(q.size(0) >= h.num_tokens, "q has shape ", q.sizes(), "; the plan was made for ", h.num_tokens, " tokens");
  check_size(q, "q", 1, h.num_qo_heads, "num_qo_heads of the plan");
  TORCH_CHECK_VALUE(cache.num_kv_heads == h.num_kv_heads, "k_cache has ", cache.num_kv_heads, " kv heads; the plan was made for ",
                    h.num_kv_heads);
  TORCH_CHECK_VALUE(cache.page_size == h.page_size, "k_cache has page_size ", cache.page_size, "; the plan was made for ",
                    h.page_size);
  const int64_t lists = int64_t(h.batch_size) * (h.lists_per_head ? h.num_kv_heads : 1);
  TORCH_CHECK_VALUE(block_table.size(0) >= lists, "block_table has shape ", block_table.sizes(), "; the plan needs ", lists,
                    " rows");
  const int64_t pages = ceil_div(h.max_kv_len, h.page_size);
  TORCH_CHECK_VALUE(block_table.size(1) >= pages, "block_table has shape ", block_table.sizes(), "; the plan's longest list has ",
                    h.max_kv_len, " tokens, that is ", pages, " pages");
}

// Page ids that will be followed. One id stands for a whole page of reads, so the scan costs nothing beside them.
void check_page_ids(const PlanView& plan, const at::Tensor& block_table, int64_t num_pages) {
  const PlanHeader& h = plan.header();
  for (int32_t j = 0; j < h.num_jobs; ++j) {
    const PlanJob& job = plan.jobs()[j];
    if (job.kv_head != 0 && !h.lists_per_head) continue;
    const int64_t begin = job.kv_begin / h.page_size, end = ceil_div(job.kv_end, h.page_size);
    check_range(block_table, block_table.const_data_ptr<int32_t>() + job.page_list * block_table.stride(0) + begin, end - begin,
                "block_table (the part that is read)", 0, num_pages);
  }
}

void check_per_head(const std::optional<at::Tensor>& t, const char* name, int64_t num_heads, const char* heads = "num_qo_heads") {
  if (!t.has_value()) return;
  check_tensor(*t, name, {at::kFloat}, 1);
  check_size(*t, name, 0, num_heads, heads);
}

void attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const std::optional<at::Tensor>& kv_scales, const at::Tensor& block_table, const at::Tensor& plan,
               const at::Tensor& host_plan, const at::Tensor& workspace, const at::Tensor& out,
               const std::optional<at::Tensor>& lse, const std::optional<at::Tensor>& alibi_slopes,
               const std::optional<at::Tensor>& sinks, double sm_scale, double logits_soft_cap, double k_scale, double v_scale,
               bool blocked, bool int4, std::optional<double> unified_max, const std::optional<at::Tensor>& q_descale,
               const std::optional<at::Tensor>& k_descale, const std::optional<at::Tensor>& v_descale) {
  check_tensor(q, "q", {at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn}, 3);
  check_tensor(block_table, "block_table", {at::kInt}, 2);
  const KvCacheArgs cache = check_kv_cache(k_cache, v_cache, kv_scales, k_scale, v_scale, blocked, int4);
  check_size(q, "q", 2, cache.head_dim_qk, "head_dim of k_cache");
  check_plan(plan, host_plan, q, block_table, cache);
  check_tensor(out, "out", kFloatTypes, 3);
  if (q.scalar_type() == at::kFloat8_e4m3fn) check_same_dtype(k_cache, "k_cache", q, "q");
  else check_same_dtype(out, "out", q, "q");
  check_size(out, "out", 0, q.size(0), "num_tokens");
  check_size(out, "out", 1, q.size(1), "num_qo_heads");
  check_size(out, "out", 2, cache.head_dim_vo, "head_dim of v_cache");
  check_per_head(alibi_slopes, "alibi_slopes", q.size(1));
  check_per_head(sinks, "sinks", q.size(1));
  for (const auto& [t, name] : {std::pair{&q_descale, "q_descale"}, {&k_descale, "k_descale"}, {&v_descale, "v_descale"}}) {
    TORCH_CHECK_VALUE(!t->has_value() || q.scalar_type() == at::kFloat8_e4m3fn, name, " is given for a ", q.scalar_type(),
                      " q; only a Float8_e4m3fn q and its cache have one");
    check_per_head(*t, name, cache.num_kv_heads, "num_kv_heads");
  }
  if (lse.has_value()) {
    check_tensor(*lse, "lse", {at::kFloat}, 2);
    check_contiguous(*lse, "lse");
    check_size(*lse, "lse", 0, q.size(0), "num_tokens");
    check_size(*lse, "lse", 1, q.size(1), "num_qo_heads");
  }
  TORCH_CHECK_VALUE(logits_soft_cap >= 0, "logits_soft_cap is ", logits_soft_cap, "; allowed: 0 (off) or positive");
  TORCH_CHECK_VALUE(std::isfinite(unified_max.value_or(0)), "unified_max is ", *unified_max,
                    "; allowed: a finite number, or None");
  const PlanView host_view{host_plan.const_data_ptr<int32_t>()};
  TORCH_CHECK_VALUE(!alibi_slopes.has_value() || (host_view.header().num_groups == 0 && !host_view.header().lists_per_head),
                    "alibi_slopes need query positions: not with prefix groups or per-head page lists in the plan");
  check_tensor(workspace, "workspace", {at::kFloat}, 1);
  const int64_t need = plan_workspace_floats(host_view.header(), cache.head_dim_vo);
  TORCH_CHECK_VALUE(workspace.numel() >= need, "workspace has ", workspace.numel(), " floats; this plan needs ", need);
  if (block_table.is_cpu()) check_page_ids(host_view, block_table, cache.num_pages);

  AttentionParams p{};
  fill_kv_cache(p, cache);
  p.q = q.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = optional_data<float>(lse);
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.alibi_slopes = optional_data<float>(alibi_slopes);
  p.sinks = optional_data<float>(sinks);
  p.q_descale = optional_data<float>(q_descale), p.k_descale = optional_data<float>(k_descale),
  p.v_descale = optional_data<float>(v_descale);
  p.workspace = workspace.mutable_data_ptr<float>();
  p.plan = PlanView{plan.const_data_ptr<int32_t>()};
  const PlanHeader& header = host_view.header();
  p.merge_inside = header.merge_counters_offset != 0;
  p.num_lists = header.num_workers, p.num_wide_lists = header.num_workers - header.num_narrow_workers;
  p.num_pages = int32_t(cache.num_pages), p.num_kv_heads = int32_t(cache.num_kv_heads), p.page_size = int32_t(cache.page_size);
  p.q_dtype = dtype_of(q), p.out_dtype = dtype_of(out);
  p.sm_scale = float(sm_scale * k_scale);
  p.v_scale = cache.v_scale;
  p.logits_soft_cap = float(logits_soft_cap);
  p.unified_max = float(unified_max.value_or(std::numeric_limits<double>::quiet_NaN()));
  p.q_token_stride = q.stride(0), p.q_head_stride = q.stride(1);
  p.out_token_stride = out.stride(0), p.out_head_stride = out.stride(1);
  p.block_table_stride = block_table.stride(0);
  launch(q, cpu::attention, cuda::attention, p);
}

void merge_states(const at::Tensor& v, const at::Tensor& lse, const at::Tensor& out, const at::Tensor& out_lse) {
  check_tensor(v, "v", kFloatTypes, 4);
  check_tensor(lse, "lse", {at::kFloat}, 3);
  check_tensor(out, "out", kFloatTypes, 3);
  check_tensor(out_lse, "out_lse", {at::kFloat}, 2);
  check_same_dtype(out, "out", v, "v");
  for (const auto& [t, name] : {std::pair{&v, "v"}, {&lse, "lse"}, {&out, "out"}, {&out_lse, "out_lse"}})
    check_contiguous(*t, name);
  for (int dim = 0; dim < 3; ++dim) check_size(lse, "lse", dim, v.size(dim), "as v: [num_tokens, num_states, num_heads]");
  const int64_t want[3] = {v.size(0), v.size(2), v.size(3)};
  for (int dim = 0; dim < 3; ++dim) check_size(out, "out", dim, want[dim], "[num_tokens, num_heads, head_dim] of v");
  for (int dim = 0; dim < 2; ++dim) check_size(out_lse, "out_lse", dim, want[dim], "[num_tokens, num_heads] of v");
  MergeStatesParams p{};
  p.v = v.const_data_ptr();
  p.lse = lse.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  p.out_lse = out_lse.mutable_data_ptr<float>();
  p.num_tokens = v.size(0);
  p.num_states = int32_t(v.size(1)), p.num_heads = int32_t(v.size(2)), p.head_dim = int32_t(v.size(3));
  p.dtype = dtype_of(v);
  launch(v, cpu::merge_states, cuda::merge_states, p);
}

void implement(torch::Library& m) {
  impl<"attention", attention>(m);
  impl<"merge_states", merge_states>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def(
      "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? kv_scales, Tensor block_table, Tensor plan, "
      "Tensor host_plan, Tensor(a!) workspace, Tensor(b!) out, Tensor(c!)? lse, Tensor? alibi_slopes, Tensor? sinks, *, "
      "float sm_scale, float logits_soft_cap, float k_scale=1.0, float v_scale=1.0, bool blocked, bool int4, "
      "float? unified_max=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None) -> ()");
  m.def("merge_states(Tensor v, Tensor lse, Tensor(a!) out, Tensor(b!) out_lse) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
