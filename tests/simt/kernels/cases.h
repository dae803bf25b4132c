// Small kernels by name, for test_simt.py: name -> a function that launches it on a buffer.
#pragma once

#include <map>
#include <string>

#include "cuda/runtime.cuh"

namespace simt_test {

using Case = void (*)(float* data);  // 4,096 floats

std::map<std::string, Case>& cases();

struct Register {
  Register(const char* name, Case run) { cases()[name] = run; }
};

// CASE(name, config...) { kernel body, with `float* data` }
#define CASE(NAME, ...)                                                                       \
  __global__ void NAME##_kernel(float* data);                                                 \
  const ::simt_test::Register register_##NAME(#NAME, [](float* data) {                        \
    tilestream::cuda::launch(NAME##_kernel, tilestream::cuda::LaunchConfig{__VA_ARGS__}, data); \
  });                                                                                         \
  __global__ void NAME##_kernel([[maybe_unused]] float* data)

}  // namespace simt_test
