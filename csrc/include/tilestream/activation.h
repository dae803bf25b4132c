// The activations of gated layers: act(gate) * up, by an op of its own (norm.h) or in a linear's epilogue (linear.h).
#pragma once

#include <cstdint>

namespace tilestream {

enum class Activation : int32_t { kNone = -1, kSilu = 0, kGeluTanh = 1 };

}  // namespace tilestream
