// Several ranks: each a host thread with an emulated GPU of its own, which sees the others' memory as its
// own.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace simt {

// Runs body(rank) for every rank at once; each launches its kernels. Throws std::runtime_error with the
// report of the rank that failed. When every rank only polls, a signal was lost: the report says where each
// of them waits.
void run_ranks(int num_ranks, const std::function<void(int rank)>& body);

// An address for multimem that stands for `bytes` at each of `peers`; plain accesses to it fault.
void* make_multicast(const std::vector<void*>& peers, size_t bytes);
void free_multicast(void* address);

// What a multicast address stands for.
std::vector<void*> peers(const char* what, const void* address, size_t bytes);

}  // namespace simt
