// The three tensors of quantised activations (tilestream/quantise.h), checked.
#pragma once

#include "api/checks.h"
#include "tilestream/quantise.h"

namespace tilestream::api {

// How many of a row's elements are INT4 shows in its length.
inline QuantisedRows check_quantised(const at::Tensor& q, const at::Tensor& scale, const at::Tensor& sum, int64_t rows,
                                     int64_t k) {
  TORCH_CHECK_VALUE(k % kGroupK == 0, "the rows to quantise have ", k, " elements; allowed: multiples of ", kGroupK);
  check_tensor(q, "q", {at::kChar}, 2);
  check_tensor(scale, "scale", {at::kFloat}, 2);
  check_tensor(sum, "sum", {at::kInt}, 2);
  const auto check = [&](const at::Tensor& t, const char* name, int64_t columns, const char* why) {
    check_contiguous(t, name);
    check_size(t, name, 0, rows, "rows");
    check_size(t, name, 1, columns, why);
  };
  check_contiguous(q, "q");
  check_size(q, "q", 0, rows, "rows");
  const int64_t k4 = 2 * (k - q.size(1));
  TORCH_CHECK_VALUE(k4 >= 0 && k4 <= k && k4 % kScaleK == 0, "q has shape ", q.sizes(),
                    "; dimension 1 must be k - k4 / 2 with k = ", k, " and k4, the INT4 elements, a multiple of ", kScaleK,
                    " from 0 to k");
  check(scale, "scale", ceil_div(k, kScaleK), "k / 128, rounded up");
  check(sum, "sum", k / kGroupK, "k / 32");
  return {q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(), sum.mutable_data_ptr<int32_t>(), k4};
}

}  // namespace tilestream::api
