// Collectives: lanes of a warp, or the warps of a warpgroup, that execute one instruction together.
#include <bit>
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

// Lanes of a warpgroup are numbered 0 to 127; a mask names lanes of one warp, or is 0 for the whole warpgroup.
bool overlaps(const Rendezvous& other, uint32_t mask) { return mask == 0 || (other.mask & mask) != 0; }

void check_matches(const Rendezvous& other, const char* what, uint32_t mask, const void* pc) {
  const bool same = std::strcmp(other.what, what) == 0 && other.mask == mask && (other.pc == pc || where(other.pc) == where(pc));
  if (same) return;
  const std::string text = format("divergent %s (mask %08x), while %s waits in %s (mask %08x) at %s", what, mask,
                                  describe(*other.waiting[0]).c_str(), other.what, other.mask, where(other.pc).c_str());
  Machine::of_this_thread().fail_current(text, pc);
}

void order_memory(const std::vector<Thread*>& threads) {
  auto clock = std::make_shared<Clock>(*threads[0]->seen);
  for (const Thread* t : threads) {
    if (t->seen != threads[0]->seen) join(*clock, *t->seen);
  }
  for (const Thread* t : threads) (*clock)[t->tid] = t->now;
  for (Thread* t : threads) t->seen = clock, ++t->now;
}

void meet(std::vector<Rendezvous>& under_way, const char* what, uint32_t mask, unsigned lane, int expected, void* arguments,
          void (*body)(LaneArguments), bool orders_memory, const void* pc) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  size_t at = 0;
  while (at < under_way.size() && !overlaps(under_way[at], mask)) ++at;
  if (at == under_way.size()) under_way.push_back({what, pc, mask, 0, expected, {}, {}});
  else check_matches(under_way[at], what, mask, pc);

  Rendezvous& meeting = under_way[at];
  meeting.arguments[lane] = arguments;
  meeting.waiting.push_back(&me);
  if (++meeting.arrived == expected) {
    const Rendezvous all = std::move(meeting);
    under_way.erase(under_way.begin() + at);
    if (orders_memory) order_memory(all.waiting);
    kernel_runs = false;  // what it touches are the lanes' arguments
    body(all.arguments);
    kernel_runs = true;
    for (Thread* t : all.waiting) machine.wake(t);
  }
  machine.block_current(what, pc, format("mask %08x", mask));
}

}  // namespace

void warp_collective(const char* what, uint32_t mask, void* arguments, void (*body)(LaneArguments), bool orders_memory) {
  const void* pc = __builtin_return_address(0);
  Thread& me = *Machine::of_this_thread().current;
  if ((mask >> me.lane & 1) == 0) fail("%s with mask %08x by lane %u, which the mask does not name", what, mask, me.lane);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const size_t index = me.warp * kWarpSize + lane;
    if (index >= me.owner->threads.size())
      fail("%s with mask %08x, but the block has no lane %u in warp %u", what, mask, lane, me.warp);
    if (me.owner->threads[index]->finished)
      fail("%s with mask %08x waits for lane %u, which has returned from the kernel", what, mask, lane);
  }
  meet(me.owner->warps[me.warp], what, mask, me.lane, std::popcount(mask), arguments, body, orders_memory, pc);
}

void warpgroup_collective(const char* what, void* arguments, void (*body)(LaneArguments), const void* pc) {
  Thread& me = *Machine::of_this_thread().current;
  const unsigned group = me.warp / 4, lane = me.warp % 4 * kWarpSize + me.lane;
  if ((group + 1) * kWarpgroupSize > me.owner->threads.size()) fail("%s by warp %u, whose warpgroup is not whole", what, me.warp);
  for (unsigned i = 0; i < kWarpgroupSize; ++i) {
    if (me.owner->threads[group * kWarpgroupSize + i]->finished)
      fail("%s waits for warp %u, which has returned from the kernel", what, (group * kWarpgroupSize + i) / kWarpSize);
  }
  meet(me.owner->warpgroups[group], what, 0, lane, kWarpgroupSize, arguments, body, false, pc);
}

// Lanes that wait for one that has returned would wait for ever.
void Machine::check_collectives_after(const Thread& gone) {
  for (const Rendezvous& r : gone.owner->warps[gone.warp]) {
    if (r.mask >> gone.lane & 1)
      fail_current(format("%s with mask %08x waits for lane %u, which has returned from the kernel", r.what, r.mask, gone.lane),
                   r.pc);
  }
  for (const Rendezvous& r : gone.owner->warpgroups[gone.warp / 4])
    fail_current(format("%s waits for warp %u, which has returned from the kernel", r.what, gone.warp), r.pc);
}

}  // namespace simt
