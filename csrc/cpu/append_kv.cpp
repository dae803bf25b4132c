// Rotary embedding of q and k, key statistics, quantisation and the write into a paged cache, in one pass.
//
// All arithmetic is float32. Where two tokens share memory (the lanes of a blocked page, a page's key statistics) a page and
// head belong to one worker, which takes them in token order; otherwise tokens are shared evenly. Each input is read once,
// each output written once.
// Limits: head_dim a multiple of 16, at most 256 (api/kv_cache.h checks it).
#include "tilestream/append_kv.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/thread_pool.h"
#include "cpu/elements.h"
#include "cpu/kv_block.h"
#include "cpu/round_keys.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int kMaxHeadDim = kMaxKeyDim;
// A launch pays from about 5 us of work on one worker (measured: 3 to 5 values in 1 ns; rounded with feedback, 1.5 ns a value
// and lane, used or not, of 16).
constexpr int64_t kValuesPerWorker = 16384;
constexpr int64_t kRoundedValuesPerWorker = 4096;

// cos: [rotary_dim / 2], sin: the same.
void rotate(float* x, const float* cos, const float* sin, int rotary_dim, bool interleaved) {
  const int half = rotary_dim / 2;
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const F32x16 a = load(x + i), b = load(x + i + half), c = load(cos + i), s = load(sin + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(x + i + half, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

template <class E>
void load_row(const typename E::Storage* x, int num, float* row) {
  for (int d = 0; d < num; d += 16) store(row + d, E::load(x + d));
}

// value = q * scale + zero with scale and zero as float16 keeps them. A NaN or an infinity in the row makes scale NaN.
void quantise(const float* row, int num, int most, uint8_t* q, RowScale* stored) {
  F32x16 low = load(row), high = low, check = zero();
  for (int d = 0; d < num; d += 16) {
    low = min(low, load(row + d));
    high = max(high, load(row + d));
    check = fma(load(row + d), zero(), check);
  }
  *stored = RowScale(0.0f - reduce_max(sub(zero(), low)), reduce_max(high), reduce_add(check), most);
  const F32x16 divisor = set1(stored->divisor()), offset = set1(f16_to_float(stored->zero));
  for (int d = 0; d < num; d += 16) {
    // NaN is the first operand: both min and max then give the second.
    const F32x16 n = max(min(div(sub(load(row + d), offset), divisor), set1(float(most))), zero());
    store_low_bytes(reinterpret_cast<int8_t*>(q) + d, add(n, set1(kRoundingMagic)));
  }
}

RowScale* scale_at(const AppendKvParams& p, const KvSide& side, int64_t page, int64_t head, int64_t offset) {
  const int64_t index = kv_scale_index(side, page, head, offset, p.num_kv_heads, p.page_size);
  return reinterpret_cast<RowScale*>(static_cast<uint16_t*>(p.kv_scales) + index);
}

template <class Order>
void write_row(const AppendKvParams& p, const KvSide& side, int64_t page, int64_t head, int64_t offset, const float* row) {
  typename Order::Element stored[kMaxHeadDim];
  if constexpr (kHasScales<Order>) {
    quantise(row, side.head_dim, Order::kNibbles ? 15 : 255, stored, scale_at(p, side, page, head, offset));
  } else {
    const F32x16 scale = set1(side.is_k ? p.k_scale : p.v_scale);
    for (int d = 0; d < side.head_dim; d += 16) {
      if constexpr (std::is_same_v<Order, Float8Order>) store_e4m3(stored + d, div(load(row + d), scale));
      if constexpr (std::is_same_v<Order, Float32Order>) store(stored + d, load(row + d));
      if constexpr (std::is_same_v<Order, Float16Order>) store_f16(stored + d, load(row + d));
      if constexpr (std::is_same_v<Order, BFloat16Order>) store_bf16(stored + d, load(row + d));
    }
  }
  write_kv_row<Order>(side, page, head, offset, stored);
}

void update_key_stats(float* stats, const float* row, int head_dim, bool first) {
  float* high = stats + head_dim;
  for (int d = 0; d < head_dim; d += 16) {
    const F32x16 k = load(row + d);
    store(stats + d, first ? k : min(k, load(stats + d)));
    store(high + d, first ? k : max(k, load(high + d)));
  }
}

template <class E>
class Appender {
 public:
  explicit Appender(const AppendKvParams& p) : p_(p), k_(k_side(p)), v_(v_side(p)) {}

  void rotate_q(int64_t token) const {
    if (p_.q == nullptr || p_.cos_sin == nullptr) return;
    float row[kMaxHeadDim];
    for (int h = 0; h < p_.num_qo_heads; ++h) {
      auto* q = static_cast<typename E::Storage*>(p_.q) + token * p_.q_token_stride + h * p_.q_head_stride;
      load_row<E>(q, p_.head_dim_qk, row);
      rotate_at(token, row);
      for (int d = 0; d < p_.head_dim_qk; d += 16) E::store(q + d, load(row + d));
    }
  }

  template <class Order>
  void append(int64_t token, int64_t head) const {
    const int64_t slot = p_.slot_mapping[token], page = slot / p_.page_size, offset = slot % p_.page_size;
    const auto* v = static_cast<const typename E::Storage*>(p_.v) + token * p_.v_in_token_stride + head * p_.v_in_head_stride;
    float row[kMaxHeadDim];
    if (rounded_.codes == nullptr || p_.key_stats != nullptr) {
      load_row<E>(key_row(token, head), p_.head_dim_qk, row);
      if (p_.cos_sin != nullptr) rotate_at(token, row);
    }
    if (p_.key_stats != nullptr) {
      float* stats = p_.key_stats + (page * p_.num_kv_heads + head) * 2 * p_.head_dim_qk;
      update_key_stats(stats, row, p_.head_dim_qk, offset == 0);
    }
    if (rounded_.codes == nullptr) {
      write_row<Order>(p_, k_, page, head, offset, row);
    } else {
      *scale_at(p_, k_, page, head, offset) = rounded_.scales[rounded_index(token, head)];
      write_kv_row<Int4Order>(k_, page, head, offset, rounded_.codes + rounded_index(token, head) * p_.head_dim_qk);
    }
    load_row<E>(v, p_.head_dim_vo, row);
    write_row<Order>(p_, v_, page, head, offset, row);
  }

  // Codes of all keys, before any is written: tokens are rounded 16 at a time, whichever pages they go to.
  void round_all_keys() {
    const int64_t num_heads = p_.num_kv_heads, n = p_.head_dim_qk, num_groups = ceil_div(p_.num_tokens, 16);
    const int64_t code_bytes = round_up(num_heads * num_groups * 16 * n, 64);
    auto* memory = static_cast<uint8_t*>(scratch(Scratch::kLaunch, size_t(code_bytes + num_heads * num_groups * 16 * 4)));
    rounded_ = {memory, reinterpret_cast<RowScale*>(memory + code_bytes)};
    auto body = [&](int worker, int num_workers) {
      const Share share = share_of(num_heads * num_groups, worker, num_workers);
      alignas(64) float keys[16][kMaxKeyDim];
      for (long unit = share.begin; unit < share.end; ++unit) {
        const int64_t head = unit / num_groups, first = unit % num_groups * 16;
        for (int64_t lane = 0; lane < 16; ++lane) {
          const int64_t token = std::min(first + lane, p_.num_tokens - 1);
          load_row<E>(key_row(token, head), int(n), keys[lane]);
          if (p_.cos_sin != nullptr) rotate_at(token, keys[lane]);
        }
        const HeadRounding rounding{p_.key_offset + head * n, p_.key_order + head * n, p_.key_feedback + head * n * n, int(n)};
        const int64_t at = rounded_index(first, head);
        round_keys(rounding, keys, rounded_.codes + at * n, rounded_.scales + at);
      }
    };
    const int64_t values = num_heads * num_groups * 16 * n;
    parallel(int(std::min<int64_t>(ceil_div(values, kRoundedValuesPerWorker), 1 << 16)), body);
  }

  template <class Order>
  void run() const {
    const int64_t num_heads = p_.num_kv_heads;
    const bool shared = p_.key_stats != nullptr || (Order::kPair > 1 && k_.blocked);
    auto body = [&](int worker, int num_workers) {
      const Share share = share_of(p_.num_tokens, worker, num_workers);
      for (long t = share.begin; t < share.end; ++t) rotate_q(t);
      for (long t = shared ? 0 : share.begin; t < (shared ? p_.num_tokens : share.end); ++t) {
        const int64_t slot = p_.slot_mapping[t];
        if (slot < 0) continue;
        if (!shared) {
          for (int64_t head = 0; head < num_heads; ++head) append<Order>(t, head);
          continue;
        }
        // This worker's heads of the page: those with (page * num_heads + head) % num_workers == worker.
        const int64_t first = (worker + num_workers - slot / p_.page_size * num_heads % num_workers) % num_workers;
        for (int64_t head = first; head < num_heads; head += num_workers) append<Order>(t, head);
      }
    };
    const int64_t values = p_.num_tokens * (num_heads * (p_.head_dim_qk + p_.head_dim_vo) +
                                            (p_.q != nullptr ? int64_t(p_.num_qo_heads) * p_.head_dim_qk : 0));
    parallel(int(std::min<int64_t>(ceil_div(values, kValuesPerWorker), 1 << 16)), body);
  }

 private:
  const typename E::Storage* key_row(int64_t token, int64_t head) const {
    return static_cast<const typename E::Storage*>(p_.k) + token * p_.k_in_token_stride + head * p_.k_in_head_stride;
  }

  // Of a key among those of round_all_keys().
  int64_t rounded_index(int64_t token, int64_t head) const { return head * round_up(p_.num_tokens, 16) + token; }

  void rotate_at(int64_t token, float* row) const {
    const float* cos = p_.cos_sin + int64_t(p_.positions[token]) * p_.rotary_dim;
    rotate(row, cos, cos + p_.rotary_dim / 2, p_.rotary_dim, p_.interleaved);
  }

  struct RoundedKeys {
    uint8_t* codes = nullptr;  // [num_kv_heads, num_tokens (a multiple of 16), head_dim_qk]
    RowScale* scales = nullptr;
  };

  const AppendKvParams& p_;
  const KvSide k_, v_;
  RoundedKeys rounded_;
};

}  // namespace

void append_kv(const AppendKvParams& p) {
  with_element(p.x_dtype, [&](auto element) {
    Appender<decltype(element)> appender(p);
    if (p.key_feedback != nullptr && p.num_tokens > 0) appender.round_all_keys();
    with_block_order(p.kv_dtype, [&](auto order) { appender.template run<decltype(order)>(); });
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
