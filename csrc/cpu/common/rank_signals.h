// Where ranks that share memory wait for one another: processes of one machine, each with a block of signals that all see.
//
// Compiled once, for the base instruction set; kernels see only these declarations.
#pragma once

#include <string>

#include "tilestream/allreduce.h"

namespace tilestream::cpu {

// In a rank's block: its process's number, and, in rank 0's, the first fault that any rank found. Both int32.
constexpr int64_t kPidOffset = kSignalBytes - 8, kFaultOffset = cuda::kFaultOffset;

// What a rank says of itself in a call: that its part of the sum is there; that its tokens' results are everywhere.
enum class Milestone : int32_t { kArrived = 0, kDone = 1 };

// The number of this rank's next call on its channel; the same on every rank.
uint32_t next_call(const Ranks& ranks);
// Tells all others; what this process wrote before is there for who has waited.
void signal(const Ranks& ranks, Milestone milestone, uint32_t call);
// Returns when ranks 0..num_ranks - 1 have signalled. A rank whose process is gone, or that does not come for timeout_ms, is
// a fault: all waits of all ranks then throw std::runtime_error with the same text.
void await(const Ranks& ranks, Milestone milestone, uint32_t call, int num_ranks);

// A fault's text; 0 is none.
std::string fault_text(int fault, int world_size, int timeout_ms);

}  // namespace tilestream::cpu
