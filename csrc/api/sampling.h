// What ops that draw tokens check: parameters of each row, and how many tokens there may be.
#pragma once

#include "api/checks.h"

namespace tilestream::api {

constexpr int64_t kMaxVocabSize = (1 << 20) - 1;  // masses are summed in 44-bit fixed point in 64 bits

template <class T>
inline const T* per_row(const at::Tensor& t, const char* name, at::ScalarType type, int64_t batch_size) {
  check_tensor(t, name, {type}, 1);
  check_size(t, name, 0, batch_size, "batch_size, rows of logits");
  return t.const_data_ptr<T>();
}

// Every value must satisfy low <= value <= high (NaN fails); open_low excludes low itself.
inline void check_values(const at::Tensor& t, const char* name, float low, float high, bool open_low) {
  if (!t.is_cpu()) return;  // as check_range
  const float* values = t.const_data_ptr<float>();
  const int64_t num = t.numel();
  for (int64_t i = 0; i < num; ++i) {
    const bool ok = (open_low ? values[i] > low : values[i] >= low) && values[i] <= high;
    TORCH_CHECK_VALUE(ok, name, "[", i, "] is ", values[i], "; allowed: ", open_low ? "above " : "from ", low, " to ", high);
  }
}

}  // namespace tilestream::api
