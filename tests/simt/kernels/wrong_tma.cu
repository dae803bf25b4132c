// Kernels with one fault each, around TMA. test_simt.py has what the report must say. `map` is of data as 32
// rows of 32 floats, 8 rows at a time, swizzled.
#include "cases.h"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tensor_map.cuh"

namespace {

using namespace tilestream;

struct Storage {
  alignas(1024) float tile[2][256];
  uint64_t full;
};

#define MAP_CASE(NAME)                                                                                       \
  __global__ void NAME##_kernel(float* data, const __grid_constant__ ptx::TensorMap map);                    \
  const simt_test::Register register_##NAME(#NAME, [](float* data, const float*) {                           \
    const ptx::TensorMap map = ptx::make_tensor_map(data, 4, {{32, 4, 32}, {32, 128, 8}}, ptx::Swizzle::k128); \
    cuda::launch(NAME##_kernel, {.grid = 1, .block = 32, .smem_bytes = sizeof(Storage)}, data, map);         \
  });                                                                                                        \
  __global__ void NAME##_kernel([[maybe_unused]] float* data, const __grid_constant__ ptx::TensorMap map)

__device__ __forceinline__ Storage& storage() { return cuda::dynamic_smem<Storage>(); }

__device__ __forceinline__ void expect(Storage& s, unsigned bytes) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, bytes);
  }
  __syncwarp();
}

MAP_CASE(missing_proxy_fence_before_tensor_store) {
  Storage& s = storage();
  for (int i = threadIdx.x; i < 256; i += 32) s.tile[0][i] = 1.0f;
  __syncwarp();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_store(map, {0, 0}, s.tile[0]);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

// The fence stands before the writes that it should order.
MAP_CASE(early_proxy_fence) {
  Storage& s = storage();
  ptx::fence_proxy_async();
  for (int i = threadIdx.x; i < 256; i += 32) s.tile[0][i] = 1.0f;
  __syncwarp();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_store(map, {0, 0}, s.tile[0]);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

MAP_CASE(box_at_no_multiple_of_its_pattern) {
  Storage& s = storage();
  expect(s, 1024);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[0] + 32, map, {0, 0}, &s.full);
}

MAP_CASE(box_out_of_shared_memory) {
  Storage& s = storage();
  expect(s, 1024);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[3], map, {0, 0}, &s.full);
}

MAP_CASE(coordinates_of_another_rank) {
  Storage& s = storage();
  expect(s, 1024);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[0], map, {0, 0, 0}, &s.full);
}

MAP_CASE(box_that_nobody_waits_for) {
  Storage& s = storage();
  expect(s, 1024);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[0], map, {0, 0}, &s.full);
}

// Across the edge of the tensor fewer bytes are read, but the whole box is counted.
MAP_CASE(bytes_of_a_clipped_box) {
  Storage& s = storage();
  expect(s, 512);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[0], map, {0, 28}, &s.full);
  ptx::mbarrier_wait_parity(&s.full, 0);
}

MAP_CASE(box_read_before_its_wait) {
  Storage& s = storage();
  expect(s, 1024);
  if (threadIdx.x == 0) ptx::cp_async_bulk_tensor_load(s.tile[0], map, {0, 0}, &s.full);
  __syncwarp();
  data[threadIdx.x] = s.tile[0][threadIdx.x];
}

MAP_CASE(box_overwritten_before_it_is_stored) {
  Storage& s = storage();
  if (threadIdx.x == 0) {
    for (float& x : s.tile[0]) x = 1.0f;
    ptx::fence_proxy_async();
    ptx::cp_async_bulk_tensor_store(map, {0, 0}, s.tile[0]);
    ptx::cp_async_bulk_commit_group();
    s.tile[0][0] = 2.0f;
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

MAP_CASE(returned_before_the_store_has_read) {
  Storage& s = storage();
  if (threadIdx.x == 0) {
    for (float& x : s.tile[0]) x = 1.0f;
    ptx::fence_proxy_async();
    ptx::cp_async_bulk_tensor_store(map, {0, 0}, s.tile[0]);
    ptx::cp_async_bulk_commit_group();
  }
}

}  // namespace
