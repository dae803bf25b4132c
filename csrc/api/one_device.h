// Registration of ops for CPU and CUDA tensors: one function serves both, after a check that a call does not mix devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

namespace tilestream::api {

// An op's name as a template argument.
template <size_t kSize>
struct OpName {
  char text[kSize];
  constexpr OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

// Throws unless `t`, argument `index`, may stand beside tensors on `device`: those named host_* stay on the CPU.
inline void check_stray(const char* op, int index, const at::Tensor& t, at::Device device) {
  const auto schema = c10::Dispatcher::singleton().findSchema({std::string("tilestream::") + op, ""});
  const auto& arguments = schema->schema().arguments();
  const std::string& name = arguments[index].name();
  if (name.starts_with("host_") && t.is_cpu()) return;
  TORCH_CHECK_VALUE(false, name, " is on ", t.device(), ", but ", arguments[0].name(), " on ", device,
                    "; all tensors of a call must be on one device");
}

template <OpName kOp, auto kFunction>
struct OnOneDevice;
template <OpName kOp, class... Args, void (*kFunction)(Args...)>
struct OnOneDevice<kOp, kFunction> {
  static void call(Args... args) {
    std::optional<at::Device> device;
    int index = 0;
    const auto check = [&](const auto& arg) {
      using Arg = std::decay_t<decltype(arg)>;
      const at::Tensor* t = nullptr;
      if constexpr (std::is_same_v<Arg, at::Tensor>) t = &arg;
      else if constexpr (std::is_same_v<Arg, std::optional<at::Tensor>>) t = arg.has_value() ? &*arg : nullptr;
      if (t != nullptr && !device.has_value()) device = t->device();
      if (t != nullptr && t->device() != *device) check_stray(kOp.text, index, *t, *device);
      ++index;
    };
    (check(args), ...);
    kFunction(args...);
  }
};

template <OpName kOp, auto kFunction>
void impl(torch::Library& m) {
  m.impl(kOp.text, OnOneDevice<kOp, kFunction>::call);
}

}  // namespace tilestream::api
