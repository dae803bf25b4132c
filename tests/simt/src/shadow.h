// Who last wrote and who last read each byte of a cluster's shared memory, and when: finds races.
//
// FastTrack's idea (Flanagan & Freund 2009) with barriers for locks: two accesses, one of them a write, must be
// ordered by a barrier, an mbarrier or a wait between them, whatever the order in which they happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clock.h"

namespace simt {

struct Thread;

// One access, packed into a cell: which thread (or its asynchronous agent), at which moment of its clock, from where.
struct Access {
  uint32_t tid : 14;
  uint32_t atomic : 1;
  uint32_t now : 17;
  int32_t pc;  // relative to the emulator's code
};

class Shadow {
 public:
  // `stride` bytes of shared memory for each block of the cluster.
  Shadow(int num_blocks, size_t stride, int num_threads)
      : num_threads_(num_threads), stride_(stride), cells_(size_t(num_blocks) * stride) {}

  enum Kind { kRead, kWrite, kAtomic };
  // An access by `thread` itself, at `offset` in the cluster's shared memory.
  void access(const Thread& thread, Kind kind, const char* what, size_t offset, size_t bytes, const void* pc);
  // An access by the thread's asynchronous agent (cp.async, TMA, wgmma) at its moment `epoch`. It is recorded when it is
  // issued, however late it takes effect. `proxy`: it goes through the async proxy.
  void access_async(const Thread& issuer, Kind kind, const char* what, size_t offset, size_t bytes, int agent,
                    uint32_t epoch, bool proxy, const void* pc);

  // A thread's clock entry for its asynchronous operations of one kind (AsyncOp::Kind).
  int agent_of(int tid, int kind) const { return tid + (1 + kind) * num_threads_; }
  static constexpr int kNumAgents = 4;

 private:
  struct Cell {
    Access write{}, reads[2]{};  // the last write; the last reads of two different threads
  };
  bool ordered(const Thread& thread, const Access& before) const;
  [[noreturn]] void report(const Thread& thread, const char* what, Kind kind, size_t offset, const Access& before,
                           const char* before_kind, const void* pc) const;
  void check_and_record(const Thread& thread, Kind kind, const char* what, size_t offset, size_t bytes, Access me,
                        bool proxy, const void* pc);

  int num_threads_;
  size_t stride_;
  std::vector<Cell> cells_;
};

}  // namespace simt
