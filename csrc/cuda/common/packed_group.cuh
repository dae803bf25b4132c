// One group of 32 k of one panel in a packed weight: where its parts lie (see tilestream/linear.h).
#pragma once

#include <type_traits>

#include "cuda/runtime.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {

template <PackedFormat F>
struct GroupLayout {
  static constexpr bool kFourBit = F == PackedFormat::kU4G32S || F == PackedFormat::kU4G32;
  static constexpr bool kHasZero = F == PackedFormat::kU4G32 || F == PackedFormat::kU8G32;
  static constexpr int kOffset = kFourBit ? 8 : 128;  // code of the value 0 where no zeros are stored
  static constexpr int kHalfBytes = kFourBit ? 256 : 512;  // codes of 16 columns
  static constexpr int kScaleAt = 2 * kHalfBytes;
  static constexpr int kZeroAt = kScaleAt + 2 * kPanelColumns;
  static constexpr int kBytes = kHasZero ? kZeroAt + 2 * kPanelColumns : kZeroAt;
};

// Calls f with the format as a constant.
template <class F>
void with_format(PackedFormat format, F f) {
  switch (format) {
#define CASE(FORMAT) \
  case PackedFormat::FORMAT: return f(std::integral_constant<PackedFormat, PackedFormat::FORMAT>{});
    CASE(kFloat32) CASE(kBFloat16) CASE(kU4G32S) CASE(kU4G32) CASE(kU8G32S) CASE(kU8G32)
#undef CASE
  }
}

}  // namespace tilestream::cuda
