// The packed formats as constants.
#pragma once

#include <type_traits>

#include "cuda/runtime.cuh"
#include "tilestream/linear.h"

namespace tilestream::cuda {

// Calls f with the format as a constant.
template <class F>
void with_format(PackedFormat format, F f) {
  switch (format) {
#define CASE(FORMAT) \
  case PackedFormat::FORMAT: return f(std::integral_constant<PackedFormat, PackedFormat::FORMAT>{});
    CASE(kFloat32) CASE(kBFloat16) CASE(kU4G32S) CASE(kU4G32) CASE(kU8G32S) CASE(kU8G32) CASE(kU4G128S)
    CASE(kU4G128) CASE(kU8G128S) CASE(kRowsBFloat16) CASE(kRowsFloat16)
#undef CASE
  }
}

}  // namespace tilestream::cuda
