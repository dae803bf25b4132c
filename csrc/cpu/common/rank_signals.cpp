#include "cpu/common/rank_signals.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <stdexcept>
#include <thread>

#include "cpu/common/pause.h"

namespace tilestream::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A rank that comes in time is met spinning. One that is late may need this CPU (more ranks than cores): then its turn is given
// away, and after some hundred microseconds the wait becomes a sleep.
constexpr int kSpinsBeforeYield = 400;
constexpr auto kYieldTime = std::chrono::microseconds(300);
// A sleeper looks up this often, whether a rank has died meanwhile.
constexpr auto kSleepTime = std::chrono::milliseconds(5);

// The last call in which its rank reached a milestone. A line of its own: everyone reads it while its rank writes.
struct alignas(64) Signal {
  std::atomic<uint32_t> call, num_sleepers;
};

Signal& signal_of(const Ranks& ranks, int rank, Milestone milestone) {
  return reinterpret_cast<Signal*>(ranks.memory[rank])[2 * ranks.channel + int(milestone)];
}
std::atomic<int32_t>& word_of(const Ranks& ranks, int rank, int64_t offset) {
  return *reinterpret_cast<std::atomic<int32_t>*>(ranks.memory[rank] + offset);
}
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(Signal) * 2 * kChannels <= kPidOffset);

// Calls are counted beyond 2^32.
bool has_come(const Signal& signal, uint32_t call) {
  return int32_t(signal.call.load(std::memory_order_acquire) - call) >= 0;
}

// Not private to the process: ranks see the word at different addresses.
void sleep_on(Signal& signal, uint32_t seen) {
  const timespec limit{0, std::chrono::nanoseconds(kSleepTime).count()};
  syscall(SYS_futex, &signal.call, FUTEX_WAIT, seen, &limit, nullptr, 0);
}
void wake_sleepers(Signal& signal) { syscall(SYS_futex, &signal.call, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

// Also of a process that has ended and that nobody has waited for yet. Where the system does not say, it lives.
bool has_ended(int pid) {
  const int descriptor = int(syscall(SYS_pidfd_open, pid, 0));
  if (descriptor < 0) return errno == ESRCH;
  pollfd ended{descriptor, POLLIN, 0};
  const bool result = poll(&ended, 1, 0) == 1;
  close(descriptor);
  return result;
}

// The first fault stands.
[[noreturn]] void fail(const Ranks& ranks, int fault) {
  int32_t first = 0;
  if (word_of(ranks, 0, kFaultOffset).compare_exchange_strong(first, fault)) first = fault;
  throw std::runtime_error(fault_text(first, ranks.world_size, ranks.timeout_ms));
}

void await_rank(const Ranks& ranks, int rank, Signal& signal, uint32_t call) {
  for (int spins = 0; spins < kSpinsBeforeYield; ++spins) {
    if (has_come(signal, call)) return;
    pause_cpu();
  }
  const auto start = Clock::now();
  while (Clock::now() - start < kYieldTime) {
    if (has_come(signal, call)) return;
    std::this_thread::yield();
  }
  while (true) {
    signal.num_sleepers.fetch_add(1);
    const uint32_t seen = signal.call.load();
    if (int32_t(seen - call) < 0) sleep_on(signal, seen);
    signal.num_sleepers.fetch_sub(1);
    if (has_come(signal, call)) return;
    if (const int fault = word_of(ranks, 0, kFaultOffset).load()) fail(ranks, fault);
    for (int other = 0; other < ranks.world_size; ++other) {  // the one waited for may itself wait for a dead one
      if (!has_ended(word_of(ranks, other, kPidOffset).load())) continue;
      if (has_come(signal, call)) return;  // a rank may end when all is done
      fail(ranks, kMaxRanks + 1 + other);
    }
    if (Clock::now() - start <= std::chrono::milliseconds(ranks.timeout_ms)) continue;
    for (int other = 0; other < ranks.world_size; ++other) {  // an owner that waits itself is not to blame
      if (!has_come(signal_of(ranks, other, Milestone::kArrived), call)) fail(ranks, 1 + other);
    }
    fail(ranks, 1 + rank);
  }
}

}  // namespace

uint32_t next_call(const Ranks& ranks) {
  return signal_of(ranks, ranks.rank, Milestone::kArrived).call.load(std::memory_order_relaxed) + 1;
}

void signal(const Ranks& ranks, Milestone milestone, uint32_t call) {
  Signal& own = signal_of(ranks, ranks.rank, milestone);
  own.call.store(call);  // in one order with num_sleepers: either the sleeper sees the call or it is seen here
  if (own.num_sleepers.load() > 0) wake_sleepers(own);
}

void await(const Ranks& ranks, Milestone milestone, uint32_t call, int num_ranks) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    Signal& signal = signal_of(ranks, rank, milestone);
    if (!has_come(signal, call)) await_rank(ranks, rank, signal, call);
  }
}

std::string fault_text(int fault, int world_size, int timeout_ms) {
  const int rank = (fault - 1) % kMaxRanks;
  const std::string name = "rank " + std::to_string(rank) + " of " + std::to_string(world_size);
  if (fault > kMaxRanks) return name + " has died: its process has ended";
  return name + " did not come to an all-reduce within " + std::to_string(timeout_ms) + " ms";
}

}  // namespace tilestream::cpu
