// Small kernels by name, for test_simt.py: name -> a function that launches it on a buffer.
#pragma once

#include <map>
#include <string>

#include "cuda/runtime.cuh"

namespace simt_test {

using Case = void (*)(float* data, const float* inputs);  // what the kernel sees; what was in it, as the host sees it

std::map<std::string, Case>& cases();

struct Register {
  Register(const char* name, Case run) { cases()[name] = run; }
};

// A kernel of several ranks: the buffers of all, as rank `rank` sees them.
struct RankBuffers {
  float* const* of_rank;
  float* multicast;
  int rank, num;
};
using RankCase = void (*)(const RankBuffers&);
std::map<std::string, RankCase>& rank_cases();

struct RegisterRanks {
  RegisterRanks(const char* name, RankCase run) { rank_cases()[name] = run; }
};

// CASE(name, config...) { kernel body, with `float* data` }
#define CASE(NAME, ...)                                                                       \
  __global__ void NAME##_kernel(float* data);                                                 \
  const ::simt_test::Register register_##NAME(#NAME, [](float* data, const float*) {          \
    tilestream::cuda::launch(NAME##_kernel, tilestream::cuda::LaunchConfig{__VA_ARGS__}, data); \
  });                                                                                         \
  __global__ void NAME##_kernel([[maybe_unused]] float* data)

}  // namespace simt_test
