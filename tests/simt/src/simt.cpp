#include "simt/simt.h"

#include "machine.h"

namespace simt {

const Position& self() { return *Machine::of_this_thread().current; }

uint32_t shared_address(const void* pointer) {
  Machine& machine = Machine::of_this_thread();
  const Cluster& cluster = *machine.current->owner->cluster;
  if (machine.cluster_of(pointer) != &cluster) fail("%p is not in shared memory of this cluster", pointer);
  const size_t offset = static_cast<const unsigned char*>(pointer) - cluster.arena;
  return uint32_t(offset / cluster.stride * kSharedWindow + offset % cluster.stride);
}

void* shared_pointer(const char* what, uint32_t address, size_t bytes, size_t alignment) {
  const Cluster& cluster = *Machine::of_this_thread().current->owner->cluster;
  const size_t rank = address / kSharedWindow, offset = address % kSharedWindow;
  if (address % alignment != 0) fail("%s: shared address 0x%x is not a multiple of %zu", what, address, alignment);
  if (rank >= cluster.blocks.size() || offset + bytes > cluster.shared_bytes)
    fail("out of bounds: %s of %zu bytes at byte 0x%zx of shared memory, which has %zu bytes", what, bytes, offset,
         cluster.shared_bytes);
  if (cluster.blocks[rank]->live == 0) fail("%s in shared memory of block %zu of the cluster, which has ended", what, rank);
  return cluster.arena + rank * cluster.stride + offset;
}

void fence() {
  Machine& machine = Machine::of_this_thread();
  if (machine.global_shadow != nullptr) machine.global_shadow->fence(*machine.current);
}
void acquire(const void* address) {
  Machine& machine = Machine::of_this_thread();
  if (machine.global_shadow != nullptr) machine.global_shadow->acquire(*machine.current, address);
}
void release(const void* address) {
  Machine& machine = Machine::of_this_thread();
  if (machine.global_shadow != nullptr) machine.global_shadow->release(*machine.current, address);
}

void preempt() { Machine::of_this_thread().preempt_current(); }
void poll(const char* what) { Machine::of_this_thread().poll_current(what, __builtin_return_address(0)); }
unsigned elected_lane() { return Machine::of_this_thread().elected_lane; }
uint64_t time_ns() { return Machine::of_this_thread().time_ns(); }
int random_below(int n) { return Machine::of_this_thread().random_below(n); }

}  // namespace simt
