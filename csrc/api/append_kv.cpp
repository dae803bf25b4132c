// tilestream::append_kv and tilestream::gather_kv: tensors -> checks -> params -> backend.
#include "tilestream/append_kv.h"

#include <torch/library.h>

#include "api/kv_cache.h"
#include "api/launch.h"
#include "api/one_device.h"

namespace tilestream::api {
namespace {

void check_tokens(const at::Tensor& t, const char* name, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
  check_size(t, name, 0, num_tokens, "num_tokens");
  check_size(t, name, 1, num_heads, "num_kv_heads of the cache");
  check_size(t, name, 2, head_dim, "head_dim of the cache");
}

const int32_t* check_slots(const at::Tensor& slot_mapping, int64_t num_tokens, const KvCacheArgs& cache, int64_t least) {
  check_tensor(slot_mapping, "slot_mapping", {at::kInt}, 1);
  check_size(slot_mapping, "slot_mapping", 0, num_tokens, "num_tokens");
  const int32_t* slots = slot_mapping.const_data_ptr<int32_t>();
  check_range(slot_mapping, slots, num_tokens, "slot_mapping", least, cache.num_pages * cache.page_size);
  return slots;
}

void fill_key_rounding(AppendKvParams& p, const KvCacheArgs& cache, const at::Tensor& offset, const at::Tensor& order,
                       const at::Tensor& feedback) {
  TORCH_CHECK_VALUE(cache.int4, "key_rounding is for int4 caches; this one is ", cache.k.scalar_type());
  const int64_t want[3] = {cache.num_kv_heads, cache.head_dim_qk, cache.head_dim_qk};
  const auto check = [&](const at::Tensor& t, const char* name, at::ScalarType dtype, int64_t dims) {
    check_tensor(t, name, {dtype}, dims);
    check_contiguous(t, name);
    for (int64_t dim = 0; dim < dims; ++dim) check_size(t, name, dim, want[dim], dim == 0 ? "num_kv_heads" : "head_dim");
  };
  check(offset, "key_offset", at::kFloat, 2);
  check(order, "key_order", at::kInt, 2);
  check(feedback, "key_feedback", at::kFloat, 3);
  p.key_offset = offset.const_data_ptr<float>();
  p.key_order = order.const_data_ptr<int32_t>();
  p.key_feedback = feedback.const_data_ptr<float>();
  check_range(order, p.key_order, order.numel(), "key_order", 0, cache.head_dim_qk);
}

void append_kv(const std::optional<at::Tensor>& q, const at::Tensor& k, const at::Tensor& v,
               const std::optional<at::Tensor>& cos_sin, const at::Tensor& positions, const at::Tensor& slot_mapping,
               const at::Tensor& k_cache, const at::Tensor& v_cache, const std::optional<at::Tensor>& kv_scales,
               const std::optional<at::Tensor>& key_stats, const std::optional<at::Tensor>& key_offset,
               const std::optional<at::Tensor>& key_order, const std::optional<at::Tensor>& key_feedback, bool interleaved,
               double k_scale, double v_scale, bool blocked, bool int4) {
  const KvCacheArgs cache = check_kv_cache(k_cache, v_cache, kv_scales, k_scale, v_scale, blocked, int4);
  check_tensor(k, "k", kFloatTypes, 3);
  check_tensor(v, "v", kFloatTypes, 3);
  check_same_dtype(v, "v", k, "k");
  const int64_t num_tokens = k.size(0);
  check_tokens(k, "k", num_tokens, cache.num_kv_heads, cache.head_dim_qk);
  check_tokens(v, "v", num_tokens, cache.num_kv_heads, cache.head_dim_vo);
  check_tensor(positions, "positions", {at::kInt}, 1);
  check_size(positions, "positions", 0, num_tokens, "num_tokens");

  AppendKvParams p{};
  fill_kv_cache(p, cache);
  p.slot_mapping = check_slots(slot_mapping, num_tokens, cache, -1);
  p.positions = positions.const_data_ptr<int32_t>();
  if (q.has_value()) {
    check_tensor(*q, "q", kFloatTypes, 3);
    check_same_dtype(*q, "q", k, "k");
    check_size(*q, "q", 0, num_tokens, "num_tokens");
    check_size(*q, "q", 2, cache.head_dim_qk, "head_dim of the cache");
    p.q = q->mutable_data_ptr();
    p.num_qo_heads = int32_t(q->size(1));
    p.q_token_stride = q->stride(0), p.q_head_stride = q->stride(1);
  }
  if (cos_sin.has_value()) {
    check_tensor(*cos_sin, "cos_sin", {at::kFloat}, 2);
    check_contiguous(*cos_sin, "cos_sin");
    TORCH_CHECK_VALUE(cos_sin->size(1) % 2 == 0 && cos_sin->size(1) <= cache.head_dim_qk, "cos_sin has rotary_dim ",
                      cos_sin->size(1), "; allowed: even, at most head_dim ", cache.head_dim_qk);
    check_range(positions, p.positions, num_tokens, "positions", 0, cos_sin->size(0));
    p.cos_sin = cos_sin->const_data_ptr<float>();
    p.rotary_dim = int32_t(cos_sin->size(1));
  }
  if (key_stats.has_value()) {
    check_tensor(*key_stats, "key_stats", {at::kFloat}, 4);
    check_contiguous(*key_stats, "key_stats");
    const int64_t want[4] = {cache.num_pages, cache.num_kv_heads, 2, cache.head_dim_qk};
    for (int dim = 0; dim < 4; ++dim)
      check_size(*key_stats, "key_stats", dim, want[dim], "[num_pages, num_kv_heads, 2, head_dim]");
    p.key_stats = key_stats->mutable_data_ptr<float>();
  }
  TORCH_CHECK_VALUE(key_offset.has_value() == key_feedback.has_value() && key_order.has_value() == key_feedback.has_value(),
                    "key_offset, key_order and key_feedback go together; only some are given");
  if (key_feedback.has_value()) fill_key_rounding(p, cache, *key_offset, *key_order, *key_feedback);
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.num_tokens = num_tokens;
  p.num_kv_heads = int32_t(cache.num_kv_heads);
  p.k_scale = cache.k_scale, p.v_scale = cache.v_scale;
  p.page_size = int32_t(cache.page_size);
  p.interleaved = interleaved;
  p.x_dtype = dtype_of(k);
  p.k_in_token_stride = k.stride(0), p.k_in_head_stride = k.stride(1);
  p.v_in_token_stride = v.stride(0), p.v_in_head_stride = v.stride(1);
  launch(k, cpu::append_kv, cuda::append_kv, p);
}

void gather_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const std::optional<at::Tensor>& kv_scales,
               const at::Tensor& slot_mapping, const at::Tensor& k, const at::Tensor& v, double k_scale, double v_scale,
               bool blocked, bool int4) {
  const KvCacheArgs cache = check_kv_cache(k_cache, v_cache, kv_scales, k_scale, v_scale, blocked, int4);
  const int64_t num_tokens = slot_mapping.size(0);
  check_tensor(k, "k", {at::kFloat}, 3);
  check_tensor(v, "v", {at::kFloat}, 3);
  check_contiguous(k, "k");
  check_contiguous(v, "v");
  check_tokens(k, "k", num_tokens, cache.num_kv_heads, cache.head_dim_qk);
  check_tokens(v, "v", num_tokens, cache.num_kv_heads, cache.head_dim_vo);
  GatherKvParams p{};
  fill_kv_cache(p, cache);
  p.slot_mapping = check_slots(slot_mapping, num_tokens, cache, 0);
  p.k = k.mutable_data_ptr<float>();
  p.v = v.mutable_data_ptr<float>();
  p.num_tokens = num_tokens;
  p.num_kv_heads = int32_t(cache.num_kv_heads);
  p.k_scale = cache.k_scale, p.v_scale = cache.v_scale;
  p.page_size = int32_t(cache.page_size);
  launch(k, cpu::gather_kv, cuda::gather_kv, p);
}

void implement(torch::Library& m) {
  impl<"append_kv", append_kv>(m);
  impl<"gather_kv", gather_kv>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def(
      "append_kv(Tensor(a!)? q, Tensor k, Tensor v, Tensor? cos_sin, Tensor positions, Tensor slot_mapping, Tensor(b!) k_cache, "
      "Tensor(c!) v_cache, Tensor(d!)? kv_scales, Tensor(e!)? key_stats, Tensor? key_offset=None, Tensor? key_order=None, "
      "Tensor? key_feedback=None, *, bool interleaved, "
      "float k_scale=1.0, float v_scale=1.0, bool blocked, bool int4) -> ()");
  m.def(
      "gather_kv(Tensor k_cache, Tensor v_cache, Tensor? kv_scales, Tensor slot_mapping, Tensor(a!) k, Tensor(b!) v, *, "
      "float k_scale=1.0, float v_scale=1.0, bool blocked, bool int4) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
