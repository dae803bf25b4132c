// What the twins of CUDA's and of csrc/cuda/ptx's functions are made of: the emulator as a kernel sees it.
//
// Every function here is called from a CUDA thread, that is from a fiber. The report of a fault names `what`, the
// instruction as its wrapper is called, and the line of the kernel that called it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "simt/vector_types.h"

namespace simt {

constexpr uint32_t kFullMask = 0xffffffffu;
constexpr unsigned kWarpSize = 32, kWarpgroupSize = 128;

// Where a thread stands; threadIdx and its siblings read this.
struct Position {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned lane, warp;           // of the block
  unsigned cluster_rank, cluster_size;
  void* shared;                  // dynamic shared memory of the block
};
__attribute__((const)) const Position& self();

// ---- faults: the launch stops, and throws std::runtime_error with this text and the kernel's line
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers of a block: `id` 0 is __syncthreads. num_threads 0 means every thread of the block that has not returned.
enum class Reduce { kNone, kCount, kAnd, kOr };
int barrier_sync(const char* what, int id, int num_threads, Reduce reduce = Reduce::kNone, int predicate = 0);
void barrier_arrive(const char* what, int id, int num_threads);

// ---- collectives: each lane in `mask` brings a pointer to its own arguments; the last to arrive runs `body` for all.
// Lanes that bring another `what`, another mask or another source line are reported as divergent.
// `orders_memory`: also a barrier for shared memory among these lanes.
using LaneArguments = void* const*;  // [32]; null for lanes outside the mask
void warp_collective(const char* what, uint32_t mask, void* arguments, void (*body)(LaneArguments),
                     bool orders_memory = false);

// ---- memory that a wrapper itself reads or writes, checked as if the kernel had done it
void read(const char* what, const void* address, size_t bytes);
void write(const char* what, const void* address, size_t bytes);
void atomic(const char* what, const void* address, size_t bytes);  // unordered with plain accesses, fine with atomics
// Global memory, of this rank or of another, that a wrapper reads or writes by itself.
void read_global(const char* what, const void* address, size_t bytes);
void write_global(const char* what, const void* address, size_t bytes);
// What orders global memory among blocks; a release or acquire is on the word at `address`.
void fence();
void acquire(const void* address);
void release(const void* address);
uint32_t shared_address(const void* pointer);  // PTX's 32-bit shared address; also valid in the cluster's window
void* shared_pointer(const char* what, uint32_t address, size_t bytes, size_t alignment);

// ---- scheduling
void preempt();                    // another thread may run now
void poll(const char* what);       // as preempt, and this thread waits for a change it can only see by looking again
int random_below(int n);           // by the launch's seed
uint64_t time_ns();                // of ranks: stands still until all of them only poll, then leaps, twice as far each time
unsigned elected_lane();           // of elect.sync, by the launch's seed

}  // namespace simt
