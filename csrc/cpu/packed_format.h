// The packed formats as constants.
#pragma once

#include <type_traits>

#include "tilestream/linear.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

// f(format as a std::integral_constant).
template <class Fn>
inline void with_format(PackedFormat format, Fn&& f) {
  switch (format) {
#define CASE(FORMAT) \
  case PackedFormat::FORMAT: return f(std::integral_constant<PackedFormat, PackedFormat::FORMAT>{});
    CASE(kFloat32) CASE(kBFloat16) CASE(kU4G32S) CASE(kU4G32) CASE(kU8G32S) CASE(kU8G32) CASE(kU4G128S)
    CASE(kU4G128) CASE(kU8G128S) CASE(kRowsBFloat16) CASE(kRowsFloat16)
#undef CASE
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
