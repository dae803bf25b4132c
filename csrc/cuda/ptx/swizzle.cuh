// The order of 16-byte chunks in shared memory that TMA (tensor_map.cuh) and wgmma agree on. No PTX, hence no
// twin.
#pragma once

#include "cuda/runtime.cuh"

namespace tilestream::ptx {

// Rows of so many bytes; eight of them repeat the pattern, so a tile is aligned to 8 rows (1024 bytes for
// k128).
enum class Swizzle : int { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

constexpr int swizzle_bytes(Swizzle swizzle) { return 16 << int(swizzle); }

// Where the byte at `address` of a tile without swizzle lies: bits 4 to 6 of the shared address, as many as
// the row has, are xored with bits 7 to 9. The eight chunks of a column then lie in different banks.
TILESTREAM_HOST_DEVICE constexpr unsigned swizzled(Swizzle swizzle, unsigned address) {
  return address ^ ((address >> 3) & (((1u << int(swizzle)) - 1) << 4));
}

}  // namespace tilestream::ptx
