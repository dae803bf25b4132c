// What a tensor map is made from, and what the hardware asks of it. Plain C++, for the GPU and for the
// emulator.
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

// Throws std::invalid_argument for what cuTensorMapEncodeTiled refuses, and for rows that are not as wide as
// the swizzle.
inline void check_tensor_map(const void* base, int element_bytes, std::initializer_list<TensorDim> dims,
                             Swizzle swizzle) {
  const auto require = [](bool ok, const char* what, uint64_t value, const char* allowed) {
    const std::string text = std::string(what) + " is " + std::to_string(value) + "; allowed: " + allowed;
    if (!ok) throw std::invalid_argument("tensor map: " + text);
  };
  require(dims.size() >= 1 && dims.size() <= 5, "rank", dims.size(), "1 to 5");
  const auto address = reinterpret_cast<uint64_t>(base), element = uint64_t(element_bytes);
  require(address % 16 == 0, "address", address, "multiples of 16");
  require(element == 1 || element == 2 || element == 4, "element_bytes", element, "1, 2, 4");
  const TensorDim& inner = *dims.begin();
  require(inner.stride_bytes == element, "innermost stride_bytes", inner.stride_bytes, "element_bytes");
  const uint64_t row_bytes = inner.box * element, swizzled_bytes = uint64_t(swizzle_bytes(swizzle));
  require(row_bytes % 16 == 0, "bytes of the box's innermost dimension", row_bytes, "multiples of 16");
  require(swizzle == Swizzle::kNone || row_bytes == swizzled_bytes, "bytes of the box's innermost dimension",
          row_bytes, "the bytes of the swizzle");
  for (const TensorDim& dim : dims) {
    require(dim.size >= 1 && dim.size <= uint64_t{1} << 32, "size", dim.size, "1 to 2^32");
    require(dim.box >= 1 && dim.box <= 256, "box", dim.box, "1 to 256");
    const bool aligned = dim.stride_bytes % 16 == 0 && dim.stride_bytes < uint64_t{1} << 40;
    require(&dim == &inner || aligned, "stride_bytes", dim.stride_bytes, "multiples of 16 below 2^40");
  }
}

}  // namespace tilestream::ptx
