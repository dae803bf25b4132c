// Rows of a packed weight, dequantised: the embedding table and the output head share one copy.
#include <algorithm>

#include "cpu/common/thread_pool.h"
#include "cpu/dispatch.h"
#include "cpu/elements.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kElementsPerWorker = 16384;  // a launch pays from about 5 us of work on one worker

// 32 values of one column from one group (quantised) or from 32 k (float formats).
template <PackedFormat F>
void read_group(const uint8_t* group, int column, float* values) {
  using Layout = GroupLayout<F>;
  const uint8_t* codes = group + column / 16 * Layout::kHalfBytes + column % 16 * 4;
  uint8_t q[kGroupK];
  for (int v = 0; v < kGroupK / 8; ++v) {
    for (int b = 0; b < 4; ++b) {
      if constexpr (Layout::kFourBit) {
        q[8 * v + b] = codes[64 * v + b] & 0x0f;
        q[8 * v + 4 + b] = codes[64 * v + b] >> 4;
      } else {
        q[8 * v + b] = codes[128 * v + b];
        q[8 * v + 4 + b] = codes[128 * v + 64 + b];
      }
    }
  }
  uint16_t half[2] = {};
  std::memcpy(half, group + Layout::kScaleAt + 2 * column, 2);
  const float scale = f16_to_float(half[0]);
  if constexpr (Layout::kHasZero) std::memcpy(half + 1, group + Layout::kZeroAt + 2 * column, 2);
  const float zero = Layout::kHasZero ? f16_to_float(half[1]) : -float(Layout::kOffset) * scale;
  for (int i = 0; i < kGroupK; i += 16) store(values + i, fma(load_u8(q + i), set1(scale), set1(zero)));
}

void read_values(PackedFormat format, const uint8_t* panel, int column, int64_t begin, int64_t num,
                 float* values) {
  const int64_t g = begin / kGroupK;
  switch (format) {
    case PackedFormat::kU4G32S: {
      constexpr auto F = PackedFormat::kU4G32S;
      return read_group<F>(panel + g * GroupLayout<F>::kBytes, column, values);
    }
    case PackedFormat::kU4G32: {
      constexpr auto F = PackedFormat::kU4G32;
      return read_group<F>(panel + g * GroupLayout<F>::kBytes, column, values);
    }
    case PackedFormat::kU8G32S: {
      constexpr auto F = PackedFormat::kU8G32S;
      return read_group<F>(panel + g * GroupLayout<F>::kBytes, column, values);
    }
    case PackedFormat::kU8G32: {
      constexpr auto F = PackedFormat::kU8G32;
      return read_group<F>(panel + g * GroupLayout<F>::kBytes, column, values);
    }
    case PackedFormat::kBFloat16: {
      const uint16_t* pairs = reinterpret_cast<const uint16_t*>(panel);
      for (int64_t i = 0; i < num; ++i) {
        values[i] = bf16_to_float(pairs[((begin + i) / 2 * kPanelColumns + column) * 2 + (begin + i) % 2]);
      }
      return;
    }
    case PackedFormat::kFloat32: {
      const float* floats = reinterpret_cast<const float*>(panel);
      for (int64_t i = 0; i < num; ++i) values[i] = floats[(begin + i) * kPanelColumns + column];
      return;
    }
    default: return;  // row-major: refused by embedding()
  }
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  if (is_row_major(p.format)) refuse_row_major();
  const int64_t stride = panel_bytes(p.format, p.k);
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(p.num_tokens, worker, num_workers);
    with_element(p.y_dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t token = share.begin; token < share.end; ++token) {
        const int64_t id = p.ids[token];
        const uint8_t* panel = static_cast<const uint8_t*>(p.weight) + id / kPanelColumns * stride;
        auto* y = static_cast<typename E::Storage*>(p.y) + token * p.k;
        for (int64_t k = 0; k < p.k; k += kGroupK) {
          float values[kGroupK] = {};
          const int64_t num = std::min<int64_t>(kGroupK, p.k - k);
          read_values(p.format, panel, int(id % kPanelColumns), k, num, values);
          store_part<E>(y + k, load(values), std::min<int64_t>(num, 16));
          if (num > 16) store_part<E>(y + k + 16, load(values + 16), num - 16);
        }
      }
    });
  };
  parallel(int(std::min(p.num_tokens * p.k / kElementsPerWorker + 1, p.num_tokens)), body);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
