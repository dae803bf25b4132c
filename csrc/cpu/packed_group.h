// One group of 32 k of one panel in a packed weight: where its parts lie (see tilestream/linear.h).
#pragma once

#include "cpu/simd/vec.h"
#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

template <PackedFormat F>
struct GroupLayout {
  static constexpr bool kFourBit = F == PackedFormat::kU4G32S || F == PackedFormat::kU4G32;
  static constexpr bool kHasZero = F == PackedFormat::kU4G32 || F == PackedFormat::kU8G32;
  static constexpr int kOffset = kFourBit ? 8 : 128;  // code of the value 0 where no zeros are stored
  static constexpr int64_t kHalfBytes = kFourBit ? 256 : 512;  // codes of 16 columns
  static constexpr int64_t kScaleAt = 2 * kHalfBytes;
  static constexpr int64_t kZeroAt = kScaleAt + 2 * kPanelColumns;
  static constexpr int64_t kBytes = kHasZero ? kZeroAt + 2 * kPanelColumns : kZeroAt;
};

constexpr bool is_eight_bit(PackedFormat f) {
  return f == PackedFormat::kU8G32S || f == PackedFormat::kU8G32;
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
