// What every twin header starts from.
#pragma once

#include <cstring>

#include "simt/simt.h"

// A twin is inlined into the kernel always: the address of the call is then the kernel's line.
#define SIMT_TWIN inline __attribute__((always_inline))

namespace simt {

// Moves bytes between types, as registers do.
template <class To, class From>
SIMT_TWIN To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace simt
