// cp.async: the copy is made at some moment between its issue and its wait, by the seed. Its bytes belong to the thread's
// asynchronous agent from the issue on, so a reader who has not waited is reported whenever the copy was made.
#include "simt/async.h"

#include <cstring>

#include "machine.h"

namespace simt {

void cp_async(void* dst, const void* src, int bytes, int src_bytes) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  const void* pc = __builtin_return_address(0);
  if (src_bytes < 0 || src_bytes > bytes) fail("cp.async of %d bytes from %d; allowed: 0 to %d", bytes, src_bytes, bytes);
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0 && src_bytes > 0)
    fail("cp.async of %d bytes from %p, which is not aligned to that", bytes, src);
  Cluster& cluster = *me.owner->cluster;
  shared_pointer("cp.async", shared_address(dst), bytes, bytes);
  machine.global_access(Shadow::kRead, "cp.async", src, src_bytes, pc);
  const uint32_t epoch = ++me.async_now[AsyncOp::kCpAsync];
  cluster.shadow->access_async(me, Shadow::kWrite, "cp.async", static_cast<unsigned char*>(dst) - cluster.arena, bytes,
                               cluster.shadow->agent_of(me.tid, AsyncOp::kCpAsync), epoch, false, pc);
  std::memset(dst, 0xff, bytes);  // what was there is gone, what comes is not there yet
  auto op = std::make_shared<AsyncOp>();
  op->issuer = &me;
  op->kind = AsyncOp::kCpAsync;
  op->group = int(me.group_epochs[AsyncOp::kCpAsync].size());
  op->effect = [dst, src, bytes, src_bytes] {
    std::memset(dst, 0, bytes);
    std::memcpy(dst, src, src_bytes);
  };
  machine.issue(std::move(op));
}

void cp_async_commit_group() {
  Thread& me = *Machine::of_this_thread().current;
  me.group_epochs[AsyncOp::kCpAsync].push_back(me.async_now[AsyncOp::kCpAsync]);
}

void cp_async_wait_group(int pending) {
  Machine& machine = Machine::of_this_thread();
  machine.wait_group(AsyncOp::kCpAsync, pending, *machine.current);
}

void cp_async_mbarrier_arrive(uint64_t* address) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  Mbarrier& bar = find_mbarrier("cp.async.mbarrier.arrive", address);
  const int agent = me.owner->cluster->shadow->agent_of(me.tid, AsyncOp::kCpAsync);
  auto op = std::make_shared<AsyncOp>();
  op->issuer = &me;
  op->kind = AsyncOp::kCpAsync;
  op->group = int(me.group_epochs[AsyncOp::kCpAsync].size());
  op->effect = [&machine, &bar, agent, epoch = me.async_now[AsyncOp::kCpAsync], seen = me.seen, before = me.pending] {
    for (const auto& copy : before) {
      if (copy->kind == AsyncOp::kCpAsync) machine.force(*copy);
    }
    join(bar.clock, *seen);
    bar.clock[agent] = std::max(bar.clock[agent], epoch);
    --bar.pending;
    bar.complete_if_full();
  };
  machine.issue(std::move(op));
}

// Makes every operation of the current thread's older groups happen, and orders the thread after them. `issuer` holds the
// operations: the thread itself, or the first of its warpgroup. `only_read`: they have read shared memory, no more.
void Machine::wait_group(AsyncOp::Kind kind, int pending, const Thread& issuer, bool only_read) {
  Thread& me = *current;
  const int num_done = int(me.group_epochs[kind].size()) - pending;
  if (num_done <= 0) return;
  for (const auto& op : std::vector(issuer.pending)) {
    if (op->kind != kind || op->group >= num_done) continue;
    if (!only_read) force(*op);
    else if (op->read) op->read();
  }
  auto clock = std::make_shared<Clock>(*me.seen);
  uint32_t& seen = (*clock)[me.owner->cluster->shadow->agent_of(issuer.tid, kind)];
  seen = std::max(seen, me.group_epochs[kind][num_done - 1]);
  me.seen = std::move(clock);
}

}  // namespace simt
