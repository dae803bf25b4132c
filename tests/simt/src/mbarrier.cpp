// mbarriers. The state lives beside the emulated memory; the eight bytes in shared memory are only the object's name.
#include "machine.h"
#include "simt/async.h"

namespace simt {

Mbarrier& find_mbarrier(const char* what, uint64_t* bar) {
  const Thread& me = *Machine::of_this_thread().current;
  Cluster& cluster = *me.owner->cluster;
  shared_pointer(what, shared_address(bar), 8, 8);
  const auto found = cluster.mbarriers.find(bar);
  if (found == cluster.mbarriers.end()) fail("%s on an mbarrier that was never initialised", what);
  const Mbarrier& state = found->second;
  if (me.tid != state.init_tid && (*me.seen)[state.init_tid] < state.init_now)
    fail("%s on an mbarrier whose init by %s is not ordered before it: a barrier is missing", what,
         describe(*cluster.threads[state.init_tid]).c_str());
  return found->second;
}

void Mbarrier::complete_if_full() {
  if (pending > 0 || tx_bytes != 0) return;
  last = std::make_shared<const Clock>(std::move(clock));
  clock = Clock{};
  pending = count;
  ++phase;
}

void mbarrier_init(uint64_t* bar, unsigned count) {
  shared_pointer("mbarrier.init", shared_address(bar), 8, 8);
  if (count < 1 || count >= 1u << 20) fail("mbarrier.init with count %u; allowed: 1 to 2^20 - 1", count);
  Mbarrier fresh;
  const Thread& me = *Machine::of_this_thread().current;
  fresh.count = fresh.pending = int(count);
  fresh.init_tid = me.tid, fresh.init_now = me.now;
  me.owner->cluster->mbarriers[bar] = fresh;
}

void mbarrier_arrive(const char* what, uint64_t* address, unsigned expect_bytes) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  Mbarrier& bar = find_mbarrier(what, address);
  if (bar.pending == 0) fail("%s: more than %d arrivals in one phase", what, bar.count);
  bar.tx_bytes += expect_bytes;
  --bar.pending;
  join(bar.clock, *me.seen);
  bar.clock[me.tid] = std::max(bar.clock[me.tid], me.now++);
  bar.complete_if_full();
  machine.preempt_current();
}

bool mbarrier_try_wait(uint64_t* address, unsigned parity) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (parity > 1) fail("mbarrier.try_wait with parity %u; allowed: 0 or 1", parity);
  Mbarrier& bar = find_mbarrier("mbarrier.try_wait", address);
  if (unsigned(bar.phase & 1) == parity) {
    machine.poll_current("mbarrier.try_wait", __builtin_return_address(0),
                         format("parity %u of the mbarrier at byte 0x%x, which lacks %d arrivals and %lld bytes", parity,
                                shared_address(address), bar.pending, (long long)bar.tx_bytes));
  }
  if (unsigned(bar.phase & 1) == parity) return false;
  if (bar.last != nullptr) {
    auto clock = std::make_shared<Clock>(*me.seen);
    join(*clock, *bar.last);
    me.seen = clock;
  }
  return true;
}

void fence_proxy_async() {
  Thread& me = *Machine::of_this_thread().current;
  me.proxy_fence = me.now++;
}

void* map_shared(void* pointer, unsigned rank) {
  const Cluster& cluster = *Machine::of_this_thread().current->owner->cluster;
  if (rank >= cluster.blocks.size()) fail("mapa to block %u of a cluster of %zu", rank, cluster.blocks.size());
  const size_t in_block = shared_address(pointer) % kSharedWindow;
  return cluster.arena + rank * cluster.stride + in_block;
}

}  // namespace simt
