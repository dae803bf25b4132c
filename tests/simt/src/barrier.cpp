// Barriers of a block (bar.sync, bar.arrive) and of a cluster.
#include <cstring>

#include "machine.h"
#include "simt/async.h"

namespace simt {
namespace {

// The waiters of a barrier go on: each has now seen what every one of them, and every mere arriver, did before.
void release(Barrier& barrier) {
  Machine& machine = Machine::of_this_thread();
  const ClockPtr first = barrier.waiting.empty() ? nullptr : barrier.waiting[0]->seen;
  if (first != nullptr) {
    auto clock = std::make_shared<Clock>(*first);
    join(*clock, barrier.clock);
    for (const Thread* t : barrier.waiting) {
      if (t->seen != first) join(*clock, *t->seen);
    }
    for (const Thread* t : barrier.waiting) (*clock)[t->tid] = t->now;
    for (Thread* t : barrier.waiting) t->seen = clock, ++t->now;
  }
  for (Thread* t : barrier.waiting) {
    t->result = barrier.reduce == Reduce::kCount ? barrier.count : barrier.reduce == Reduce::kAnd ? barrier.all : barrier.any;
    machine.wake(t);
  }
  barrier = Barrier{};
}

// Threads that meet at a barrier of the whole block must be at the same line of the kernel.
void check_same_line(const char* what, const std::vector<Thread*>& waiting) {
  for (const Thread* t : waiting) {
    if (t->wait.pc == waiting[0]->wait.pc || where(t->wait.pc) == where(waiting[0]->wait.pc)) continue;
    const std::string text = format("divergent %s: %s waits at %s, but %s at %s", what, describe(*waiting[0]).c_str(),
                                    where(waiting[0]->wait.pc).c_str(), describe(*t).c_str(), where(t->wait.pc).c_str());
    Machine::of_this_thread().fail_current(text, t->wait.pc);
  }
}

void enter(Barrier& barrier, const char* what, int id, int expected) {
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected)
    fail("%s of barrier %d for %d threads, while others use it for %d", what, id, expected, barrier.expected);
}

}  // namespace

void Barrier::arrive(Thread& thread) {
  ++arrived;
  join(clock, *thread.seen);
  clock[thread.tid] = std::max(clock[thread.tid], thread.now++);
}

void Barrier::complete_if_full(int of_all) {
  if (arrived == 0 || expected != 0 || arrived < of_all) return;
  if (!waiting.empty()) check_same_line(waiting[0]->wait.what, waiting);
  release(*this);
}

int barrier_sync(const char* what, int id, int num_threads, Reduce reduce, int predicate) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (id < 0 || id >= kNumBarriers) fail("%s of barrier %d; a block has 0 to 15", what, id);
  if (num_threads % int(kWarpSize) != 0) fail("%s for %d threads; it must be a multiple of 32", what, num_threads);
  Barrier& barrier = me.owner->barriers[id];
  enter(barrier, what, id, num_threads);
  ++barrier.arrived;
  barrier.reduce = reduce;
  barrier.count += predicate != 0, barrier.all &= predicate != 0, barrier.any |= predicate != 0;
  barrier.waiting.push_back(&me);
  me.wait = {what, __builtin_return_address(0), {}};
  if (num_threads == 0) {
    barrier.complete_if_full(me.owner->live);
  } else if (barrier.arrived == num_threads) {
    release(barrier);
  } else if (barrier.arrived > num_threads) {
    fail("%s: %d threads at barrier %d, which is for %d", what, barrier.arrived, id, num_threads);
  }
  machine.block_current(what, __builtin_return_address(0), id == 0 ? "" : format("barrier %d", id));
  return me.result;
}

void barrier_arrive(const char* what, int id, int num_threads) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (id < 0 || id >= kNumBarriers) fail("%s of barrier %d; a block has 0 to 15", what, id);
  if (num_threads <= 0 || num_threads % int(kWarpSize) != 0)
    fail("%s for %d threads; it must be a positive multiple of 32", what, num_threads);
  Barrier& barrier = me.owner->barriers[id];
  enter(barrier, what, id, num_threads);
  barrier.arrive(me);
  if (barrier.arrived == num_threads) release(barrier);
  machine.preempt_current();
}

void cluster_arrive() {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (me.cluster_arrived) fail("barrier.cluster.arrive twice without barrier.cluster.wait between");
  me.cluster_arrived = true;
  Cluster& cluster = *me.owner->cluster;
  me.cluster_phase = cluster.phase;
  cluster.barrier.arrive(me);
  if (cluster.barrier.arrived >= cluster.live) complete_cluster(cluster);
  machine.preempt_current();
}

void complete_cluster(Cluster& cluster) {
  if (cluster.barrier.arrived == 0) return;
  cluster.phase_clock = std::make_shared<const Clock>(cluster.barrier.clock);
  ++cluster.phase;
  for (Thread* t : cluster.barrier.waiting) Machine::of_this_thread().wake(t);
  cluster.barrier = Barrier{};
}

void cluster_wait() {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  if (!me.cluster_arrived) fail("barrier.cluster.wait without barrier.cluster.arrive");
  Cluster& cluster = *me.owner->cluster;
  if (cluster.phase == me.cluster_phase) {
    cluster.barrier.waiting.push_back(&me);
    machine.block_current("barrier.cluster.wait", __builtin_return_address(0));
  }
  me.cluster_arrived = false;
  auto clock = std::make_shared<Clock>(*me.seen);
  join(*clock, *cluster.phase_clock);
  me.seen = clock;
}

}  // namespace simt
