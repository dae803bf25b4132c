// Kernels with one fault each, around what changes how a grid or a warpgroup runs. test_simt.py has what the
// report must say.
#include "cases.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace {

using namespace tilestream;

__global__ void producer(float* data) {
  ptx::griddepcontrol_launch_dependents();
  data[threadIdx.x] = 1.0f;
}

// Launched after `producer`, maybe before that has ended.
#define DEPENDENT_CASE(NAME)                                                             \
  __global__ void NAME##_kernel(float* data);                                            \
  const simt_test::Register register_##NAME(#NAME, [](float* data, const float*) {       \
    cuda::launch(producer, {.grid = 1, .block = 32}, data);                              \
    cuda::launch(NAME##_kernel, {.grid = 2, .block = 64, .smem_bytes = 1024, .pdl = true}, data); \
  });                                                                                    \
  __global__ void NAME##_kernel(float* data)

DEPENDENT_CASE(missing_griddepcontrol_wait) { data[threadIdx.x + 64] = data[threadIdx.x]; }

DEPENDENT_CASE(cp_async_before_griddepcontrol_wait) {
  ptx::cp_async<16>(&cuda::dynamic_smem<float4>() + threadIdx.x, data + 4 * threadIdx.x);
  ptx::griddepcontrol_wait();
  ptx::cp_async_wait_all();
}

// The kernel between touches nothing of the producer's, but has not waited for it either: the producer may
// still run.
__global__ void between(float* data) { data[threadIdx.x + 256] = 1.0f; }
__global__ void last(float* data) { data[threadIdx.x + 512] = data[threadIdx.x]; }
const simt_test::Register chain("missing_griddepcontrol_wait_in_a_chain", [](float* data, const float*) {
  cuda::launch(producer, {.grid = 1, .block = 32}, data);
  cuda::launch(between, {.grid = 1, .block = 32, .pdl = true}, data);
  cuda::launch(last, {.grid = 1, .block = 32, .pdl = true}, data);
});

CASE(registers_beyond_the_file, .grid = 1, .block = 384) {
  if (threadIdx.x < 128) ptx::setmaxnreg_dec<40>();
  else ptx::setmaxnreg_inc<240>();
}

CASE(registers_of_half_a_warpgroup, .grid = 1, .block = 256) {
  if (threadIdx.x < 64) ptx::setmaxnreg_dec<40>();
}

CASE(registers_increased_downwards, .grid = 1, .block = 256) { ptx::setmaxnreg_inc<24>(); }

}  // namespace
