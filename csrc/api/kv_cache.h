// The paged KV cache as attention, append_kv and gather_kv receive it: checked once, in one place.
#pragma once

#include <cmath>

#include "api/checks.h"

namespace tilestream::api {

struct KvCacheArgs {
  const at::Tensor& k;
  const at::Tensor& v;
  const std::optional<at::Tensor>& scales;
  bool blocked, int4;
  float k_scale, v_scale;
  int64_t num_pages, num_kv_heads, page_size, head_dim_qk, head_dim_vo;
};

inline KvCacheArgs check_kv_cache(const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& scales,
                                  double k_scale, double v_scale, bool blocked, bool int4) {
  for (const auto& [t, name] : {std::pair{&k, "k_cache"}, std::pair{&v, "v_cache"}}) {
    check_tensor(*t, name, {at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn, at::kByte}, 4);
    TORCH_CHECK_TYPE(!int4 || t->scalar_type() == at::kByte, name, " has dtype ", t->scalar_type(),
                     "; an int4 cache is stored as Byte (two values each)");
  }
  check_same_dtype(v, "v_cache", k, "k_cache");
  const int64_t per_byte = int4 ? 2 : 1;
  KvCacheArgs a{k, v, scales, blocked, int4, float(k_scale), float(v_scale), k.size(0), k.size(1), k.size(2),
                k.size(3) * per_byte, v.size(3) * per_byte};
  for (int dim = 0; dim < 3; ++dim)
    check_size(v, "v_cache", dim, k.size(dim), "as k_cache: [num_pages, num_kv_heads, page_size, head_dim]");
  TORCH_CHECK_VALUE(a.page_size == 16 || a.page_size == 32 || a.page_size == 64, "k_cache has page_size ", a.page_size,
                    "; supported: 16, 32, 64");
  for (const int64_t d : {a.head_dim_qk, a.head_dim_vo}) {
    TORCH_CHECK_VALUE(d % 16 == 0 && d >= 16 && d <= 256, "the KV cache has head_dim ", d,
                      "; supported: multiples of 16 up to 256");
  }
  const bool quantised = k.scalar_type() == at::kByte;
  TORCH_CHECK_VALUE(quantised == scales.has_value(), "kv_scales is ", scales.has_value() ? "given" : "missing", " for a ",
                    k.scalar_type(), " cache; int8 and int4 caches need it, others must not have it");
  if (quantised) {
    check_tensor(*scales, "kv_scales", {at::kHalf}, 5);
    check_contiguous(*scales, "kv_scales");
    const int64_t want[5] = {a.num_pages, 2, a.num_kv_heads, a.page_size, 2};
    for (int dim = 0; dim < 5; ++dim)
      check_size(*scales, "kv_scales", dim, want[dim], "[num_pages, 2, num_kv_heads, page_size, 2]");
  }
  for (const auto& [scale, name] : {std::pair{k_scale, "k_scale"}, std::pair{v_scale, "v_scale"}}) {
    TORCH_CHECK_VALUE(scale == 1.0 || k.scalar_type() == at::kFloat8_e4m3fn, name, " is ", scale, " for a ", k.scalar_type(),
                      " cache; only a Float8_e4m3fn cache has one, others allow 1");
    TORCH_CHECK_VALUE(float(scale) > 0.0f && std::isfinite(float(scale)), name, " is ", scale, "; allowed: positive and finite");
  }
  if (blocked) {
    for (const auto& [t, name] : {std::pair{&k, "k_cache"}, std::pair{&v, "v_cache"}}) {
      TORCH_CHECK_VALUE(t->stride(2) == t->size(3), name, " has strides ", t->strides(),
                        "; in a blocked cache a page of one head is contiguous");
    }
  }
  return a;
}

// The fields that all parameter structs with a cache share.
template <class Params>
inline void fill_kv_cache(Params& p, const KvCacheArgs& a) {
  using KPtr = decltype(p.k_cache);
  p.k_cache = const_cast<KPtr>(a.k.const_data_ptr());
  p.v_cache = const_cast<KPtr>(a.v.const_data_ptr());
  p.kv_scales = a.scales.has_value() ? const_cast<KPtr>(a.scales->const_data_ptr()) : nullptr;
  p.head_dim_qk = int32_t(a.head_dim_qk);
  p.head_dim_vo = int32_t(a.head_dim_vo);
  p.kv_dtype = a.int4 ? DType::kUInt4 : dtype_of(a.k);
  p.kv_layout = a.blocked ? KvLayout::kBlocked : KvLayout::kStrided;
  p.k_page_stride = a.k.stride(0), p.k_head_stride = a.k.stride(1), p.k_token_stride = a.k.stride(2);
  p.v_page_stride = a.v.stride(0), p.v_head_stride = a.v.stride(1), p.v_token_stride = a.v.stride(2);
}

}  // namespace tilestream::api
