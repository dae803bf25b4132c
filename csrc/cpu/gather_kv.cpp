// Rows of a cache of any dtype and layout as plain float32: what append_kv wrote, read back.
#include <algorithm>
#include <type_traits>

#include "cpu/common/thread_pool.h"
#include "cpu/kv_block.h"
#include "tilestream/append_kv.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int kMaxHeadDim = 256;
// A launch pays from about 5 us of work on one worker (measured: a value in about 1 ns).
constexpr int64_t kValuesPerWorker = 4096;

template <class Order>
void gather_row(const GatherKvParams& p, const KvSide& side, int64_t slot, int64_t head, float* out) {
  const int64_t page = slot / p.page_size, offset = slot % p.page_size;
  typename Order::Element stored[kMaxHeadDim];
  read_kv_row<Order>(side, page, head, offset, stored);
  if constexpr (kHasScales<Order>) {
    const auto* scales = static_cast<const uint16_t*>(p.kv_scales) +
                         kv_scale_index(side, page, head, offset, p.num_kv_heads, p.page_size);
    const F32x16 scale = set1(f16_to_float(scales[0])), shift = set1(f16_to_float(scales[1]));
    for (int d = 0; d < side.head_dim; d += 16) store(out + d, fma(load_u8(stored + d), scale, shift));
  } else {
    const F32x16 scale = set1(side.is_k ? p.k_scale : p.v_scale);
    for (int d = 0; d < side.head_dim; d += 16) {
      if constexpr (std::is_same_v<Order, Float8Order>) store(out + d, mul(load_e4m3(stored + d), scale));
      if constexpr (std::is_same_v<Order, Float32Order>) store(out + d, load(stored + d));
      if constexpr (std::is_same_v<Order, Float16Order>) store(out + d, load_f16(stored + d));
      if constexpr (std::is_same_v<Order, BFloat16Order>) store(out + d, load_bf16(stored + d));
    }
  }
}

}  // namespace

void gather_kv(const GatherKvParams& p) {
  const KvSide k = k_side(p), v = v_side(p);
  const int64_t num_heads = p.num_kv_heads;
  with_block_order(p.kv_dtype, [&](auto order) {
    using Order = decltype(order);
    auto body = [&](int worker, int num_workers) {
      const Share share = share_of(p.num_tokens * num_heads, worker, num_workers);
      for (int64_t i = share.begin; i < share.end; ++i) {
        const int64_t slot = p.slot_mapping[i / num_heads], head = i % num_heads;
        gather_row<Order>(p, k, slot, head, p.k + i * p.head_dim_qk);
        gather_row<Order>(p, v, slot, head, p.v + i * p.head_dim_vo);
      }
    };
    const int64_t values = p.num_tokens * num_heads * (p.head_dim_qk + p.head_dim_vo);
    parallel(int(std::min<int64_t>(ceil_div(values, kValuesPerWorker), 1 << 16)), body);
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
