// What changes how a grid or a warpgroup runs: programmatic dependent launch, and setmaxnreg.
#include "machine.h"
#include "simt/async.h"

namespace simt {
namespace {

struct Request {
  const char* what;
  int registers;
};

// All threads of the warpgroup ask for the same.
void request(LaneArguments lanes) {
  const Request& first = *static_cast<Request*>(lanes[0]);
  for (unsigned lane = 1; lane < kWarpgroupSize; ++lane) {
    const Request& other = *static_cast<Request*>(lanes[lane]);
    if (other.registers != first.registers)
      fail("%s to %d registers in one warp and %d in another", first.what, first.registers, other.registers);
  }
}

}  // namespace

void griddepcontrol_wait() {
  Machine& machine = Machine::of_this_thread();
  machine.preempt_current();
  machine.current->owner->grid_waited = true;
  machine.current->grid_waited = machine.current->now++;
}

void setmaxnreg(const char* what, int registers, bool increase) {
  Machine& machine = Machine::of_this_thread();
  Thread& me = *machine.current;
  Block& block = *me.owner;
  const void* pc = __builtin_return_address(0);
  if (registers < 24 || registers > 256 || registers % 8 != 0)
    fail("%s to %d registers; allowed: multiples of 8 from 24 to 256", what, registers);
  Request mine{what, registers};
  warpgroup_collective(what, &mine, request, pc);

  int& now = block.registers[me.warp / 4];
  if (now == registers) return;  // another thread of the warpgroup has done it
  if (increase != (registers > now)) fail("%s to %d registers of a warpgroup that has %d", what, registers, now);
  const int more = (registers - now) * int(kWarpgroupSize);
  while (now != registers && more > block.free_registers)
    machine.poll_current(what, pc,
                         format("to %d registers from %d; the block has %d left", registers, now, block.free_registers));
  if (now == registers) return;
  block.free_registers -= more;
  now = registers;
}

}  // namespace simt
