// Checks that every op makes of its tensors, with one wording: what was wrong, the value, what is allowed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <string>

#include "tilestream/types.h"

namespace tilestream::api {

inline std::string names_of(std::initializer_list<at::ScalarType> types) {
  std::string out;
  for (const at::ScalarType t : types) out += (out.empty() ? "" : ", ") + std::string(c10::toString(t));
  return out;
}

inline void check_device(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu() || t.is_cuda(), name, " is on ", t.device(), "; tilestream runs on: cpu, cuda");
}

// Device, dtype, rank, and a contiguous last dimension (kernels take every other stride as it is).
inline void check_tensor(const at::Tensor& t, const char* name, std::initializer_list<at::ScalarType> types, int64_t ndim) {
  check_device(t, name);
  bool known = false;
  for (const at::ScalarType s : types) known |= t.scalar_type() == s;
  TORCH_CHECK_TYPE(known, name, " has dtype ", t.scalar_type(), "; supported: ", names_of(types));
  TORCH_CHECK_VALUE(t.dim() == ndim, name, " has ", t.dim(), " dimensions ", t.sizes(), "; it needs ", ndim);
  TORCH_CHECK_VALUE(ndim == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, name, " has strides ", t.strides(),
                    "; its last dimension must be contiguous (stride 1)");
}

inline void check_contiguous(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " has strides ", t.strides(), " for shape ", t.sizes(), "; it must be contiguous");
}

inline void check_size(const at::Tensor& t, const char* name, int64_t dim, int64_t want, const char* why) {
  TORCH_CHECK_VALUE(t.size(dim) == want, name, " has shape ", t.sizes(), "; dimension ", dim, " must be ", want, " (", why, ")");
}

inline void check_same_dtype(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " has dtype ", t.scalar_type(), "; it must be ",
                   like.scalar_type(), " as ", like_name);
}

// Every element in [low, high): index tensors in host memory are checked before a kernel follows them. Those on a GPU are their
// caller's to get right (in the engine they come from host lists): to read them here would wait for the GPU.
template <class T>
inline void check_range(const at::Tensor& t, const T* values, int64_t num, const char* name, int64_t low, int64_t high) {
  if (!t.is_cpu()) return;
  T least = 0, most = 0;
  if (num > 0) least = most = values[0];
  for (int64_t i = 0; i < num; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  TORCH_CHECK_VALUE(num == 0 || least >= low, name, " holds ", int64_t(least), "; allowed: ", low, " to ", high - 1);
  TORCH_CHECK_VALUE(num == 0 || most < high, name, " holds ", int64_t(most), "; allowed: ", low, " to ", high - 1);
}

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kFloat8_e4m3fn: return DType::kFloat8E4M3;
    default: return DType::kUInt8;
  }
}

constexpr std::initializer_list<at::ScalarType> kFloatTypes = {at::kFloat, at::kHalf, at::kBFloat16};

template <class T>
inline T* optional_data(const std::optional<at::Tensor>& t) {
  return t.has_value() ? t->mutable_data_ptr<T>() : nullptr;
}

}  // namespace tilestream::api
