// Asynchronous copies, mbarriers and clusters, as the twins call them.
#pragma once

#include <initializer_list>

#include "simt/simt.h"

namespace simt {

void cp_async(void* dst, const void* src, int bytes, int src_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);

void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(const char* what, uint64_t* bar, unsigned expect_bytes);
bool mbarrier_try_wait(uint64_t* bar, unsigned parity);
void fence_proxy_async();

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* bar);
void bulk_store(void* dst, const void* src, unsigned bytes);
void bulk_commit_group();
void bulk_wait_group(int pending);

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

void cluster_arrive();
void cluster_wait();
void* map_shared(void* pointer, unsigned rank);  // the same place in another block of the cluster

}  // namespace simt
