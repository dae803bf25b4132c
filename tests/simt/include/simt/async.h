// Asynchronous copies, mbarriers and clusters, as the twins call them.
#pragma once

#include <initializer_list>

#include "simt/simt.h"

namespace simt {

void cp_async(void* dst, const void* src, int bytes, int src_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void cp_async_mbarrier_arrive(uint64_t* bar);  // by those issued so far

void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(const char* what, uint64_t* bar, unsigned expect_bytes);
bool mbarrier_try_wait(uint64_t* bar, unsigned parity);
void fence_proxy_async();

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar);
void bulk_store(void* dst, const void* src, unsigned bytes);
void bulk_commit_group();
void bulk_wait_group(int pending);       // until they have written
void bulk_wait_group_read(int pending);  // until they have read

// TMA of more than one dimension: what the emulator's tensor map holds, as large and as aligned as the hardware's.
struct alignas(64) TensorMap {
  char* base;
  uint64_t size[5], stride[5];
  int box[5], rank, element_bytes;
  unsigned swizzle_mask;         // bits 4 to 6 of the shared address that are xored with bits 7 to 9
};
static_assert(sizeof(TensorMap) == 128);
void tensor_load(const char* what, void* dst, const TensorMap& map, const int* coordinates, int rank, uint64_t* bar,
                 unsigned ranks);
void tensor_store(const char* what, const TensorMap& map, const int* coordinates, int rank, const void* src);

// wgmma: one thread's part of the instruction. Elements as in the twin of ptx/mma.cuh.
enum class Element { kF16, kBF16, kE4M3, kS8 };
struct Wgmma {
  const char* what;
  Element element;
  int num_registers;             // of d
  bool major_mn_a, major_mn_b;
  void* d;
  const unsigned* a;             // a fragment, or null: desc_a
  uint64_t desc_a, desc_b;
  bool accumulate;
};
void wgmma(const Wgmma& part);
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(int pending, std::initializer_list<const void*> registers);

void setmaxnreg(const char* what, int registers, bool increase);
void griddepcontrol_wait();

void cluster_arrive();
void cluster_wait();
void* map_shared(void* pointer, unsigned rank);  // the same place in another block of the cluster

}  // namespace simt
