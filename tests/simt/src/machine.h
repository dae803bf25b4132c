// The emulated GPU of one host thread: launches, blocks, threads, and who runs next.
#pragma once

#include <atomic>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "global_shadow.h"
#include "shadow.h"
#include "simt/launch.h"
#include "simt/simt.h"
#include "written.h"

namespace simt {

constexpr int kNumBarriers = 16;                  // PTX ISA 9.7.13.1
constexpr size_t kSharedWindow = size_t{1} << 18;  // of one block, in the 32-bit shared address space
constexpr int kMaxCluster = 16;

struct Block;
struct Cluster;
struct RankGroup;

// What a blocked thread waits for, as a deadlock report says it.
struct Wait {
  const char* what = nullptr;
  const void* pc = nullptr;
  std::string detail;
};

// An asynchronous operation between its issue and its effect.
struct AsyncOp {
  struct Thread* issuer;
  int group;                     // its commit group, by kind
  enum Kind { kCpAsync, kBulkLoad, kBulkStore, kWgmma } kind;
  const void* pc = nullptr;      // where it was issued
  std::function<void()> read;    // of a bulk store: its first half, which a wait may ask for alone
  std::function<void()> effect;
};

struct Thread : Position {
  Fiber fiber;
  Block* owner = nullptr;
  int tid = 0;                   // in the cluster
  ClockPtr seen;                 // what it has been ordered after
  uint32_t now = 1, async_now[Shadow::kNumAgents] = {};
  uint32_t proxy_fence = 0;      // `now` at its last fence.proxy.async
  uint32_t grid_waited = 0;      // `now` at its griddepcontrol.wait
  uint32_t last_bulk_store = 0;  // the agent's moment of the last one, and where it was issued
  const void* last_bulk_store_pc = nullptr;
  Wait wait;
  bool finished = false, polling = false;
  int result = 0;                // of the barrier's reduction
  // by AsyncOp::Kind: the agent's moment at each group's commit; and the operations not yet done
  std::vector<uint32_t> group_epochs[Shadow::kNumAgents];
  std::vector<std::shared_ptr<AsyncOp>> pending;
  // Registers of the wgmmas under way: accumulators, whose values live here until the wait, and fragments of a.
  struct WgmmaRegisters {
    char* begin;
    size_t bytes;
    std::shared_ptr<std::vector<uint32_t>> value;  // of accumulators; null for fragments
    const void* pc;                                // of the last wgmma on them
    int group;
  };
  std::vector<WgmmaRegisters> wgmma_registers;
  bool wgmma_fenced = false;     // since the last commit
  bool cluster_arrived = false;  // and not yet waited
  int cluster_phase = 0;

  void reset();                  // to what a thread is before its first instruction
};

struct Barrier {
  std::vector<Thread*> waiting;
  int arrived = 0, expected = 0;
  Reduce reduce = Reduce::kNone;
  int count = 0;
  bool all = true, any = false;
  Clock clock;                   // of those that arrived without waiting
  void arrive(Thread& thread);   // counts it, and what it did before
  void complete_if_full(int expected);
};

// One collective under way: lanes of a warp (or of a warpgroup) that have arrived.
struct Rendezvous {
  const char* what;
  const void* pc;
  uint32_t mask;
  int arrived = 0, expected = 0;
  void* arguments[kWarpgroupSize] = {};
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  int count = 0, pending = 0;    // arrivals of a phase; those still to come
  int64_t tx_bytes = 0;          // expected and not yet copied
  int init_tid = 0;              // who initialised it, and when: everyone else must be ordered after that
  uint32_t init_now = 0;
  unsigned phase = 0;
  Clock clock;                   // of the arrivals of this phase
  ClockPtr last;                 // of the phase that completed last
  void complete_if_full();
};

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  std::vector<Thread*> threads;
  int live = 0;
  Barrier barriers[kNumBarriers];
  std::vector<std::vector<Rendezvous>> warps, warpgroups;  // collectives under way
  std::vector<int> registers;    // of a thread of each warpgroup, by setmaxnreg
  int free_registers = 0;
  bool grid_waited = false;      // griddepcontrol.wait, by any thread
};

struct Cluster {
  ~Cluster() { std::free(arena); }
  std::vector<std::unique_ptr<Block>> blocks;
  size_t index = 0;                // in the grid
  unsigned char* arena = nullptr;  // the blocks' shared memory, `stride` apart: the gaps are out of bounds
  size_t stride = 0, shared_bytes = 0;
  std::unique_ptr<Shadow> shadow;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<const void*, Mbarrier> mbarriers;  // by address
  Barrier barrier;               // barrier.cluster
  ClockPtr phase_clock;          // of the last phase that completed
  int phase = 0, live = 0;
};

class Machine {
 public:
  static Machine& of_this_thread();

  void run(const LaunchConfig& config, const std::function<void()>& kernel, const void* kernel_address);

  // For the functions of simt.h, called on a fiber.
  Thread* current = nullptr;
  void block_current(const char* what, const void* pc, std::string detail = {});
  void wake(Thread* thread);
  void preempt_current();
  void poll_current(const char* what, const void* pc, std::string detail = {});
  [[noreturn]] void fail_current(const std::string& text, const void* pc);

  // Asynchronous operations: run at once, at a random later moment, or when forced, by the seed.
  void issue(std::shared_ptr<AsyncOp> op);
  void force(AsyncOp& op);
  void wait_group(AsyncOp::Kind kind, int pending, const Thread& issuer, bool only_read = false);
  int random_below(int n) { return int(random_() % uint64_t(n)); }
  const LaunchConfig& config() const { return config_; }
  unsigned elected_lane = 0;

  // Global memory. With programmatic dependent launch the kernel before may still run until griddepcontrol.wait.
  void global_access(Shadow::Kind kind, const char* what, const void* address, size_t bytes, const void* pc);
  GlobalShadow* global_shadow = nullptr;  // if races are looked for

  RankGroup* ranks = nullptr;      // of which this is one
  int rank = -1;
  uint64_t time_ns();
  Cluster* cluster_of(const void* shared_pointer);

 private:
  enum class Order { kForward, kBackward, kRandom };
  enum class Moment { kLatest, kEarliest, kRandom };

  void start_cluster();
  void update_shared_range();
  bool on_fiber() const;
  void check_collectives_after(const Thread& finished);
  void retire(Thread* thread);
  bool only_polls(int rounds, double since);
  Thread* pick();
  void schedule();
  [[noreturn]] void report_deadlock(const char* reason);
  static void fiber_main();

  LaunchConfig config_;
  const std::function<void()>* kernel_ = nullptr;
  const void* kernel_address_ = nullptr;
  std::mt19937_64 random_;
  Order order_ = Order::kForward;
  Moment moment_ = Moment::kLatest;
  std::deque<Thread*> runnable_;
  std::vector<Thread*> polling_;
  std::vector<std::shared_ptr<AsyncOp>> async_;
  std::vector<std::unique_ptr<Cluster>> clusters_;  // those under way
  std::vector<int64_t> waiting_clusters_;
  std::vector<std::unique_ptr<Thread>> idle_threads_;
  std::string failure_;
  int live_clusters_ = 0;
  std::unique_ptr<GlobalShadow> own_global_shadow_;  // of a launch outside a group of ranks
  Written written_, written_before_;  // by this launch; by those before it that may still run
  bool ended_before_wait_ = false;    // a block of this launch never waited for them
  const void* kernel_before_ = nullptr;
  uint64_t progress_seen_ = 0;
  int idle_rounds_ = 0;
};

// Ranks that run at once (ranks.cpp). `progress` counts what any of them did but poll. A rank is idle at the progress that it
// has looked at for some rounds and found nothing; when all are idle at the same, nothing will come.
struct RankGroup {
  explicit RankGroup(int num) : idle_at(num), global_shadow(kMaxBlocks, num) {}
  static constexpr size_t kMaxBlocks = 16;  // of a launch: so few are resident at once sooner or later, whatever else runs
  static constexpr uint64_t kEnded = ~uint64_t{0};
  std::atomic<uint64_t> progress{1};
  std::vector<std::atomic<uint64_t>> idle_at;
  std::atomic<bool> deadlocked{false}, failed{false};
  GlobalShadow global_shadow;
  // The clock. When all are idle it leaps if anyone has looked at it since the last time, for a timeout to come.
  static constexpr uint64_t kLastLeapNs = uint64_t{1} << 45;  // ten hours
  bool leap(uint64_t at_progress);
  std::atomic<uint64_t> time_ns{1 << 20};
  std::atomic<bool> time_read{false};
  std::mutex leap_mutex;
};
struct Stopped {};  // thrown in a rank when another has failed

// Set while launches run, for hooks.cpp to tell quickly which accesses matter.
struct SharedRange { const unsigned char *begin = nullptr, *end = nullptr; };
extern thread_local __attribute__((tls_model("initial-exec"))) SharedRange shared_range;
extern thread_local __attribute__((tls_model("initial-exec"))) Thread* watched;
extern thread_local __attribute__((tls_model("initial-exec"))) bool kernel_runs, watches_loads;

// As warp_collective, of the four warps of a warpgroup; `body` gets 128 arguments.
void warpgroup_collective(const char* what, void* arguments, void (*body)(LaneArguments), const void* pc);

Mbarrier& find_mbarrier(const char* what, uint64_t* bar);  // initialised, and ordered after that
void complete_cluster(Cluster& cluster);  // if every thread of it has arrived

std::string describe(const Thread& thread);   // "thread (3,0,0) of block (1,0,0)"
std::string where(const void* pc);            // "kernel.cu:41 in load_tile", or the bare address
std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
