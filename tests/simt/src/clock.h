// Vector clocks: which moments of which threads a thread has been ordered after.
//
// Threads that met at a barrier share one immutable vector, so joining a block costs one pass, not one per pair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Clock = std::vector<uint32_t>;
using ClockPtr = std::shared_ptr<const Clock>;

// An empty clock has seen nothing.
inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

}  // namespace simt
