// Rows of a packed weight, dequantised: the embedding table and the output head share one copy.
#include <algorithm>

#include "cpu/common/thread_pool.h"
#include "cpu/dispatch.h"
#include "cpu/elements.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kElementsPerWorker = 16384;  // a launch pays from about 5 us of work on one worker

// 32 values from k of one column of a group-quantised panel.
template <PackedFormat F>
void read_part(const uint8_t* panel, int column, int64_t num_k, int64_t k, float* values) {
  using Layout = GroupLayout<F>;
  const int64_t g = k / group_k(F);
  const uint8_t* const group = panel + g * Layout::kBytes;
  const uint8_t* const scales = group + Layout::parts(num_k, g) * Layout::kCodeBytes + 2 * column;
  const uint8_t* codes =
      group + k % group_k(F) / kGroupK * Layout::kCodeBytes + column / 16 * Layout::kHalfBytes + column % 16 * 4;
  uint8_t q[kGroupK];
  for (int i = 0; i < kGroupK / 2; ++i) {
    const int at = 64 * (i / 4) + i % 4;
    q[i] = Layout::kFourBit ? codes[at] & 0x0f : codes[at];
    q[kGroupK / 2 + i] = Layout::kFourBit ? codes[at] >> 4 : codes[256 + at];
  }
  uint16_t half[2] = {};
  std::memcpy(half, scales, 2);
  const float scale = f16_to_float(half[0]);
  if constexpr (Layout::kHasZero) std::memcpy(half + 1, scales + Layout::kScaleBytes, 2);
  const float zero = Layout::kHasZero ? f16_to_float(half[1]) : -float(Layout::kOffset) * scale;
  for (int i = 0; i < kGroupK; i += 16) store(values + i, fma(load_u8(q + i), set1(scale), set1(zero)));
}

template <PackedFormat F>
void read_values(const EmbeddingParams& p, const uint8_t* panel, int column, int64_t begin, int64_t num, float* values) {
  if constexpr (is_quantised(F)) {
    read_part<F>(panel, column, p.k, begin, values);
  } else if constexpr (F == PackedFormat::kBFloat16) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(panel);
    for (int64_t i = 0; i < num; ++i) {
      values[i] = bf16_to_float(pairs[((begin + i) / 2 * kPanelColumns + column) * 2 + (begin + i) % 2]);
    }
  } else {
    const float* floats = reinterpret_cast<const float*>(panel);
    for (int64_t i = 0; i < num; ++i) values[i] = floats[(begin + i) * kPanelColumns + column];
  }
}

template <PackedFormat F>
void run_embedding(const EmbeddingParams& p) {
  const int64_t stride = panel_bytes(F, p.k);
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
          read_values<F>(p, panel, int(id % kPanelColumns), k, num, values);
          store_part<E>(y + k, load(values), std::min<int64_t>(num, 16));
          if (num > 16) store_part<E>(y + k + 16, load(values + 16), num - 16);
        }
      }
    });
  };
  parallel(int(std::min(p.num_tokens * p.k / kElementsPerWorker + 1, p.num_tokens)), body);
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  with_format(p.format, [&](auto format) {
    if constexpr (is_row_major(format)) {
      refuse_row_major();
    } else {
      run_embedding<format>(p);
    }
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
