// What a tensor map is made from, and what the hardware asks of it. Plain C++, for the GPU and for the emulator.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/ptx/swizzle.cuh"

namespace tilestream::ptx {

// One dimension of a tensor in global memory, and how much of it one copy takes.
struct TensorDim {
  uint64_t size, stride_bytes;
  uint32_t box;
};

// Throws std::invalid_argument for what cuTensorMapEncodeTiled refuses, and for rows that are not as wide as the swizzle.
inline void check_tensor_map(const void* base, int element_bytes, std::initializer_list<TensorDim> dims, Swizzle swizzle) {
  const auto require = [](bool ok, const char* what, uint64_t value, const char* allowed) {
    if (!ok) throw std::invalid_argument(std::string("tensor map: ") + what + " is " + std::to_string(value) + "; allowed: " + allowed);
  };
  require(dims.size() >= 1 && dims.size() <= 5, "rank", dims.size(), "1 to 5");
  require(reinterpret_cast<uint64_t>(base) % 16 == 0, "address", reinterpret_cast<uint64_t>(base), "multiples of 16");
  require(element_bytes == 1 || element_bytes == 2 || element_bytes == 4, "element_bytes", element_bytes, "1, 2, 4");
  const TensorDim& inner = *dims.begin();
  const uint64_t row_bytes = uint64_t(inner.box) * element_bytes;
  require(inner.stride_bytes == uint64_t(element_bytes), "stride_bytes of the innermost dimension", inner.stride_bytes, "element_bytes");
  require(row_bytes % 16 == 0, "bytes of the box's innermost dimension", row_bytes, "multiples of 16");
  require(swizzle == Swizzle::kNone || row_bytes == uint64_t(swizzle_bytes(swizzle)), "bytes of the box's innermost dimension", row_bytes,
          "the bytes of the swizzle");
  for (const TensorDim& dim : dims) {
    require(dim.size >= 1 && dim.size <= uint64_t{1} << 32, "size", dim.size, "1 to 2^32");
    require(dim.box >= 1 && dim.box <= 256, "box", dim.box, "1 to 256");
    require(&dim == &inner || (dim.stride_bytes % 16 == 0 && dim.stride_bytes < uint64_t{1} << 40), "stride_bytes", dim.stride_bytes,
            "multiples of 16 below 2^40");
  }
}

}  // namespace tilestream::ptx
