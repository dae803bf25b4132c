// mbarriers, and the bulk copies that complete on them. The state lives beside the emulated memory; the eight
// bytes in shared memory are only the object's name.
#include <cstring>

#include "machine.h"
#include "simt/async.h"

namespace simt {
namespace {

Mbarrier& find(const char* what, uint64_t* bar) {
  const Thread& me = *Machine::of_this_thread().current;
  Cluster& cluster = *me.owner->cluster;
  shared_pointer(what, shared_address(bar), 8, 8);
  const auto found = cluster.mbarriers.find(bar);
  if (found == cluster.mbarriers.end()) fail("%s on an mbarrier that was never initialised", what);
  const Mbarrier& state = found->second;
  if (me.tid != state.init_tid && (*me.seen)[state.init_tid] < state.init_now)
    fail("%s on an mbarrier whose init by %s is not ordered before it: a barrier is missing", what, describe(*cluster.threads[state.init_tid]).c_str());
  return found->second;
}

void complete_if_full(Mbarrier& bar) {
  if (bar.pending > 0 || bar.tx_bytes != 0) return;
  bar.last = std::make_shared<const Clock>(std::move(bar.clock));
  bar.clock = Clock{};
  bar.pending = bar.count;
  ++bar.phase;
}

std::shared_ptr<AsyncOp> bulk_op(const char* what, unsigned bytes, const void* global, const void* shared) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("%s of %u bytes at global address %p; both must be multiples of 16", what, bytes, global);
  shared_pointer(what, shared_address(shared), bytes, 16);
  Thread& me = *Machine::of_this_thread().current;
  ++me.async_now[AsyncOp::kBulk];
  auto op = std::make_shared<AsyncOp>();
  op->issuer = &me;
  op->kind = AsyncOp::kBulk;
  op->group = -1;
  return op;
}

void record_bulk(Shadow::Kind kind, const char* what, const void* shared, unsigned bytes, const void* pc) {
  Thread& me = *Machine::of_this_thread().current;
  Cluster& cluster = *me.owner->cluster;
  cluster.shadow->access_async(me, kind, what, static_cast<const unsigned char*>(shared) - cluster.arena, bytes,
                               cluster.shadow->agent_of(me.tid, AsyncOp::kBulk), me.async_now[AsyncOp::kBulk], true, pc);
}

}  // namespace

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
  Mbarrier& bar = find(what, address);
  if (bar.pending == 0) fail("%s: more than %d arrivals in one phase", what, bar.count);
  bar.tx_bytes += expect_bytes;
  --bar.pending;
  join(bar.clock, *me.seen);
  bar.clock[me.tid] = std::max(bar.clock[me.tid], me.now++);
  complete_if_full(bar);
  machine.preempt_current();
}

bool mbarrier_try_wait(uint64_t* address, unsigned parity) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (parity > 1) fail("mbarrier.try_wait with parity %u; allowed: 0 or 1", parity);
  Mbarrier& bar = find("mbarrier.try_wait", address);
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
  me.proxy_fence = me.now;
}

void bulk_load(void* dst, const void* src, unsigned bytes, uint64_t* address) {
  const void* pc = __builtin_return_address(0);
  Machine& machine = Machine::of_this_thread();
  Mbarrier& bar = find("cp.async.bulk", address);
  auto op = bulk_op("cp.async.bulk", bytes, src, dst);
  record_bulk(Shadow::kWrite, "cp.async.bulk", dst, bytes, pc);
  std::memset(dst, 0xff, bytes);
  const Thread* me = machine.current;
  const int agent = me->owner->cluster->shadow->agent_of(me->tid, AsyncOp::kBulk);
  op->effect = [dst, src, bytes, &bar, agent, epoch = me->async_now[AsyncOp::kBulk], seen = me->seen] {
    std::memcpy(dst, src, bytes);
    join(bar.clock, *seen);
    bar.clock[agent] = std::max(bar.clock[agent], epoch);
    bar.tx_bytes -= bytes;
    complete_if_full(bar);
  };
  machine.issue(std::move(op));
}

void bulk_store(void* dst, const void* src, unsigned bytes) {
  const void* pc = __builtin_return_address(0);
  auto op = bulk_op("cp.async.bulk", bytes, dst, src);
  record_bulk(Shadow::kRead, "cp.async.bulk", src, bytes, pc);
  op->group = int(op->issuer->group_epochs[AsyncOp::kBulk].size());
  op->effect = [dst, src, bytes] { std::memcpy(dst, src, bytes); };
  Machine::of_this_thread().issue(std::move(op));
}

void bulk_commit_group() {
  Thread& me = *Machine::of_this_thread().current;
  me.group_epochs[AsyncOp::kBulk].push_back(me.async_now[AsyncOp::kBulk]);
}

void bulk_wait_group(int pending) {
  Machine& machine = Machine::of_this_thread();
  machine.wait_group(AsyncOp::kBulk, pending, *machine.current);
}

void* map_shared(void* pointer, unsigned rank) {
  const Cluster& cluster = *Machine::of_this_thread().current->owner->cluster;
  if (rank >= cluster.blocks.size()) fail("mapa to block %u of a cluster of %zu", rank, cluster.blocks.size());
  const size_t in_block = shared_address(pointer) % kSharedWindow;
  return cluster.arena + rank * cluster.stride + in_block;
}

}  // namespace simt
