// Asynchronous copies, mbarriers and clusters, as the twins call them.
#pragma once

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

void cluster_arrive();
void cluster_wait();
void* map_shared(void* pointer, unsigned rank);  // the same place in another block of the cluster

}  // namespace simt
