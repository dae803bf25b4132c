// The cases' face where they run on a GPU: nvcc compiles this in place of face.cu. See fidelity.py.
#include <vector>

#include "cases.h"

namespace simt_test {

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

}  // namespace simt_test

extern "C" __attribute__((visibility("default"))) const char* gpu_run(const char* name, float* data, size_t num_floats) {
  using tilestream::cuda::check;
  static std::string report;
  try {
    const std::vector<float> inputs(data, data + num_floats);
    void* device = nullptr;
    check(cudaMalloc(&device, num_floats * sizeof(float)), "cudaMalloc");
    check(cudaMemcpy(device, data, num_floats * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
    simt_test::cases().at(name)(static_cast<float*>(device), inputs.data());
    check(cudaDeviceSynchronize(), name);
    check(cudaMemcpy(data, device, num_floats * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
    check(cudaFree(device), "cudaFree");
    report.clear();
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
