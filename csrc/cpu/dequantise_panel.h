// A part of a group-quantised panel as the float panel that the float tile kernels read: weights that meet floats.
#pragma once

#include "cpu/linear_tile.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// k [begin, end) of a panel of F, multiples of 32, as a panel of X: kFloat32, or kBFloat16 (rounded).
template <PackedFormat F, PackedFormat X>
inline void dequantise_panel(const uint8_t* panel, int64_t num_k, int64_t begin, int64_t end, uint8_t* out) {
  using Layout = GroupLayout<F>;
  for (int64_t k = begin; k < end; k += kGroupK, out += panel_bytes(X, kGroupK)) {
    const int64_t g = k / group_k(F);
    const uint8_t* const group = panel + g * Layout::kBytes;
    const uint8_t* const codes = group + k % group_k(F) / kGroupK * Layout::kCodeBytes;
    const auto* const scales = reinterpret_cast<const uint16_t*>(group + Layout::parts(num_k, g) * Layout::kCodeBytes);
    for (int h = 0; h < 2; ++h) {
      const F32x16 scale = load_f16(scales + 16 * h);
      const F32x16 zeros = Layout::kHasZero ? load_f16(scales + kPanelColumns + 16 * h) : zero();
      const auto weight = [&](F32x16 q) { return Layout::kHasZero ? fma(q, scale, zeros) : mul(q, scale); };
      constexpr int kMiddle = Layout::kHasZero ? 0 : Layout::kOffset;
      for (int v = 0; v < kGroupK / 8; ++v) {
        for (int half = 0; half < 2; ++half) {
          const U8x64 q = load_codes<Layout::kFourBit>(codes + h * Layout::kHalfBytes, v, half);
          const F32x16 w[4] = {weight(byte_minus<0>(q, kMiddle)), weight(byte_minus<1>(q, kMiddle)),
                               weight(byte_minus<2>(q, kMiddle)), weight(byte_minus<3>(q, kMiddle))};
          uint8_t* const to = out + panel_bytes(X, 4 * v + 16 * half) + 64 * h;
          if constexpr (X == PackedFormat::kBFloat16) {
            for (int i = 0; i < 2; ++i) store_bf16x32(to + i * 4 * kPanelColumns, bf16_pairs(w[2 * i], w[2 * i + 1]));
          } else {
            for (int i = 0; i < 4; ++i) store(reinterpret_cast<float*>(to + i * 4 * kPanelColumns), w[i]);
          }
        }
      }
    }
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
