#include "machine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace simt {
namespace {

std::atomic<unsigned long long> launch_seed{0};
std::atomic<int> device_arch{80};
constexpr size_t kRedZone = 1024;   // between the blocks' shared memory
constexpr int kPoison = 0xff;       // NaN as float, half, bfloat16 and e4m3; -1 as an integer
// Polling with no other progress for so long is a deadlock; so many rounds, when no other host thread runs a launch.
constexpr double kPollSeconds = 5;
constexpr int kPollRounds = 10000;
constexpr int kIdleRounds = 50;  // of every rank, since any of them got on
std::atomic<int> running_launches{0};
struct Running {
  Running() { ++running_launches; }
  ~Running() { --running_launches; }
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void set_seed(unsigned long long seed) { launch_seed = seed; }
void set_arch(int arch) { device_arch = arch; }
int arch() { return device_arch; }

Machine& Machine::of_this_thread() {
  // On the heap: with a thread-local of initial-exec model (hooks.cpp) all of the library's must fit in glibc's small reserve.
  static thread_local std::unique_ptr<Machine> machine = std::make_unique<Machine>();
  return *machine;
}

void run(const LaunchConfig& config, const std::function<void()>& kernel, const void* kernel_address) {
  Machine::of_this_thread().run(config, kernel, kernel_address);
}

void Machine::run(const LaunchConfig& config, const std::function<void()>& kernel, const void* kernel_address) {
  kernel_address = static_cast<const char*>(kernel_address) + 1;  // where() looks up the byte before
  const auto refuse = [&](const char* what, long long value, const char* allowed) {
    throw std::runtime_error(
        format("simt: launch of %s with %s %lld; allowed: %s", where(kernel_address).c_str(), what, value, allowed));
  };
  const long long num_threads = 1ll * config.block.x * config.block.y * config.block.z;
  const long long num_blocks = 1ll * config.grid.x * config.grid.y * config.grid.z;
  if (num_threads < 1 || num_threads > 1024) refuse("threads per block", num_threads, "1 to 1024");
  if (num_blocks < 1 || config.grid.y > 65535 || config.grid.z > 65535)
    refuse("blocks", num_blocks, "at least 1; y and z at most 65535");
  if (config.cluster < 1 || config.cluster > kMaxCluster || config.grid.x % config.cluster != 0)
    refuse("cluster size", config.cluster, "1 to 16, a divisor of the grid's x");
  if (config.smem_bytes > 227 * 1024) refuse("bytes of shared memory", config.smem_bytes, "0 to 232448");

  config_ = config;
  kernel_ = &kernel;
  kernel_address_ = kernel_address;
  const unsigned long long seed = launch_seed;
  random_.seed(seed + (rank > 0 ? 1000003ull * rank : 0));
  order_ = seed == 0 ? Order::kForward : seed == 1 ? Order::kBackward : Order::kRandom;
  moment_ = seed == 0 ? Moment::kLatest : seed == 1 ? Moment::kEarliest : Moment::kRandom;

  elected_lane = order_ == Order::kForward ? 0 : order_ == Order::kBackward ? kWarpSize - 1 : random_below(kWarpSize);
  if (!config.pdl) written_before_.clear();
  else if (ended_before_wait_) written_before_.add(written_);
  else written_before_ = std::move(written_);
  written_.clear();
  ended_before_wait_ = false;
  const char* races = std::getenv("TILESTREAM_SIMT_GLOBAL_RACES");
  global_shadow = nullptr;
  if (races != nullptr && *races == '1') {
    if (ranks == nullptr) own_global_shadow_ = std::make_unique<GlobalShadow>(num_blocks / config.cluster);
    else if (num_blocks > int64_t(RankGroup::kMaxBlocks))
      refuse("blocks", num_blocks, "1 to 16 where races between ranks are looked for");
    global_shadow = ranks == nullptr ? own_global_shadow_.get() : &ranks->global_shadow;
    global_shadow->begin_launch(std::max(rank, 0));
  }
  watches_loads = config.pdl || global_shadow != nullptr;

  const int64_t num_clusters = num_blocks / config.cluster;
  waiting_clusters_.resize(num_clusters);  // taken from the back
  std::iota(waiting_clusters_.rbegin(), waiting_clusters_.rend(), 0);
  if (order_ == Order::kBackward) std::reverse(waiting_clusters_.begin(), waiting_clusters_.end());
  if (order_ == Order::kRandom) std::shuffle(waiting_clusters_.begin(), waiting_clusters_.end(), random_);
  const bool all = config.cooperative || (ranks != nullptr && num_blocks <= int64_t(RankGroup::kMaxBlocks));
  const int64_t resident = all ? num_clusters : order_ == Order::kRandom ? 1 + random_below(3) : 1;

  runnable_.clear(), polling_.clear(), async_.clear(), failure_.clear();
  clusters_.clear();  // of a launch that failed
  live_clusters_ = 0;
  while (live_clusters_ < resident && !waiting_clusters_.empty()) start_cluster();
  schedule();
  kernel_before_ = kernel_address;
}

void Machine::start_cluster() {
  const int64_t index = waiting_clusters_.back();
  waiting_clusters_.pop_back();
  clusters_.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *clusters_.back();
  cluster.index = size_t(index);
  ++live_clusters_;

  const unsigned size = config_.cluster, per_block = config_.block.x * config_.block.y * config_.block.z;
  cluster.shared_bytes = config_.smem_bytes;
  cluster.stride = (config_.smem_bytes + 1023) / 1024 * 1024 + kRedZone;
  cluster.arena = static_cast<unsigned char*>(std::aligned_alloc(1024, size * cluster.stride));
  std::memset(cluster.arena, kPoison, size * cluster.stride);
  cluster.shadow = std::make_unique<Shadow>(config_.smem_bytes == 0 ? 0 : size, cluster.stride, size * per_block);
  const auto nothing_seen = std::make_shared<const Clock>(size * per_block * (1 + Shadow::kNumAgents), 0);
  cluster.live = size * per_block;

  const unsigned clusters_x = config_.grid.x / size;
  for (unsigned rank = 0; rank < size; ++rank) {
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.cluster = &cluster;
    block.rank = rank;
    block.live = per_block;
    block.warps.resize((per_block + kWarpSize - 1) / kWarpSize);
    block.warpgroups.resize((per_block + kWarpgroupSize - 1) / kWarpgroupSize);
    block.registers.assign(block.warpgroups.size(), int(std::min(256u, 65536 / per_block / 8 * 8)));
    const uint3 block_idx = {unsigned(index % clusters_x) * size + rank, unsigned(index / clusters_x % config_.grid.y),
                             unsigned(index / clusters_x / config_.grid.y)};
    for (unsigned i = 0; i < per_block; ++i) {
      if (idle_threads_.empty()) idle_threads_.push_back(std::make_unique<Thread>());
      cluster.threads.push_back(std::move(idle_threads_.back()));
      idle_threads_.pop_back();
      Thread& t = *cluster.threads.back();
      t.reset();
      t.thread = {i % config_.block.x, i / config_.block.x % config_.block.y, i / config_.block.x / config_.block.y};
      t.Position::block = block_idx;
      t.block_dim = config_.block, t.grid_dim = config_.grid;
      t.lane = i % kWarpSize, t.warp = i / kWarpSize;
      t.cluster_rank = rank, t.cluster_size = size;
      t.shared = cluster.arena + rank * cluster.stride;
      t.owner = &block;
      t.tid = int(cluster.threads.size()) - 1;
      t.seen = nothing_seen;
      t.fiber.start(&Machine::fiber_main);
      block.threads.push_back(&t);
      runnable_.push_back(&t);
    }
  }
  update_shared_range();
}

void Thread::reset() {
  now = 1, proxy_fence = 0, grid_waited = 0, last_bulk_store = 0, result = 0;
  std::fill(std::begin(async_now), std::end(async_now), 0);
  for (auto& epochs : group_epochs) epochs.clear();
  wait = Wait{};
  finished = polling = wgmma_fenced = cluster_arrived = false;
  pending.clear(), wgmma_registers.clear();
}

void Machine::update_shared_range() {
  shared_range = {};
  for (const auto& cluster : clusters_) {
    const unsigned char* end = cluster->arena + cluster->blocks.size() * cluster->stride;
    if (shared_range.begin == nullptr || cluster->arena < shared_range.begin) shared_range.begin = cluster->arena;
    shared_range.end = std::max(shared_range.end, end);
  }
}

void Machine::fiber_main() {
  Machine& machine = of_this_thread();
  (*machine.kernel_)();
  Thread* thread = machine.current;
  thread->finished = true;
  thread->fiber.finish();
}

// A finished thread: barriers of all threads no longer wait for it; the last one frees the cluster.
void Machine::retire(Thread* thread) {
  for (const auto& op : std::vector(thread->pending)) {
    if (op->kind != AsyncOp::kBulkLoad) force(*op);  // that one is the block's affair
  }
  Block& block = *thread->owner;
  Cluster& cluster = *block.cluster;
  --block.live, --cluster.live;
  current = thread;  // in whose name faults are reported
  if ((*thread->seen)[cluster.shadow->agent_of(thread->tid, AsyncOp::kBulkStore)] < thread->last_bulk_store)
    fail_current("returned from the kernel while a bulk store may still read its shared memory: wait_group is missing",
                 thread->last_bulk_store_pc);
  check_collectives_after(*thread);
  block.barriers[0].complete_if_full(block.live);
  if (cluster.barrier.arrived >= cluster.live) complete_cluster(cluster);
  if (config_.pdl && !block.grid_waited) ended_before_wait_ = true;
  if (cluster.live > 0) return;
  for (const auto& t : cluster.threads) {
    if (!t->pending.empty())
      fail_current("the block has ended while a bulk load that nobody waits for still writes its shared memory",
                   t->pending[0]->pc);
  }

  for (auto& t : cluster.threads) idle_threads_.push_back(std::move(t));
  std::erase_if(clusters_, [&](const auto& owned) { return owned.get() == &cluster; });
  --live_clusters_;
  update_shared_range();
  if (!waiting_clusters_.empty()) start_cluster();
}

Thread* Machine::pick() {
  if (order_ == Order::kRandom) std::swap(runnable_[random_below(int(runnable_.size()))], runnable_.back());
  Thread* thread = order_ == Order::kForward ? runnable_.front() : runnable_.back();
  if (order_ == Order::kForward) runnable_.pop_front();
  else runnable_.pop_back();
  return thread;
}

void Machine::schedule() {
  const Running running;
  double progress = seconds();  // when something other than a poll last ran
  int rounds = 0;               // of polling since
  while (live_clusters_ > 0) {
    if (moment_ == Moment::kRandom && !async_.empty() && random_below(8) == 0) force(*async_[random_below(int(async_.size()))]);
    if (runnable_.empty()) {
      if (!async_.empty()) {
        force(*async_[moment_ == Moment::kRandom ? random_below(int(async_.size())) : 0]);
        progress = seconds(), rounds = 0;
        if (polling_.empty()) continue;
      } else if (polling_.empty()) {
        report_deadlock("every thread waits");
      } else if (only_polls(++rounds, progress)) {
        report_deadlock("the threads that still run only poll");
      } else {
        sched_yield();  // another rank may be what they wait for
      }
      for (Thread* thread : polling_) runnable_.push_back(thread);
      polling_.clear();
    }
    Thread* thread = pick();
    const bool polled = thread->polling;
    if (!polled) {
      progress = seconds(), rounds = 0;
      if (ranks != nullptr) ranks->idle_at[rank] = 0;
    }
    thread->polling = false;
    current = thread;
    watched = thread->wgmma_registers.empty() ? nullptr : thread;
    kernel_runs = true;
    thread->fiber.resume();
    kernel_runs = false;
    watched = nullptr;
    if (ranks != nullptr && !polled) ++ranks->progress;
    if (!failure_.empty()) throw std::runtime_error(failure_);
    if (thread->finished) retire(thread);
    if (!failure_.empty()) throw std::runtime_error(failure_);
    current = nullptr;
  }
}

// Whether nothing that this launch polls for can still come.
bool Machine::only_polls(int rounds, double since) {
  if (ranks == nullptr) return rounds > kPollRounds && (running_launches == 1 || seconds() - since > kPollSeconds);
  if (ranks->failed) throw Stopped{};
  const uint64_t progress = ranks->progress;
  if (progress != progress_seen_) progress_seen_ = progress, idle_rounds_ = 0;
  else if (++idle_rounds_ > kIdleRounds) ranks->idle_at[rank] = progress;
  const auto idle = [&](const auto& at) { return at == progress || at == RankGroup::kEnded; };
  if (!ranks->deadlocked && std::all_of(ranks->idle_at.begin(), ranks->idle_at.end(), idle) && !ranks->leap(progress))
    ranks->deadlocked = true;
  return ranks->deadlocked;
}

uint64_t Machine::time_ns() {
  if (ranks == nullptr) return 0;
  ranks->time_read = true;
  return ranks->time_ns;
}

bool RankGroup::leap(uint64_t at_progress) {
  const std::lock_guard lock(leap_mutex);
  if (progress != at_progress) return true;  // another rank has been here
  if (!time_read || time_ns > kLastLeapNs) return false;
  time_ns = 2 * time_ns, time_read = false;
  ++progress;
  return true;
}

void Machine::block_current(const char* what, const void* pc, std::string detail) {
  current->wait = {what, pc, std::move(detail)};
  current->fiber.suspend();
}

void Machine::wake(Thread* thread) { runnable_.push_back(thread); }

void Machine::preempt_current() {
  runnable_.push_back(current);
  current->fiber.suspend();
}

void Machine::poll_current(const char* what, const void* pc, std::string detail) {
  current->wait = {what, pc, std::move(detail)};
  current->polling = true;
  polling_.push_back(current);
  current->fiber.suspend();
}

void Machine::fail_current(const std::string& text, const void* pc) {
  std::string full = "simt: " + text + "\n  at " + where(pc) + "\n  in " + describe(*current);
  if (!on_fiber()) throw std::runtime_error(full);
  failure_ = std::move(full);
  current->fiber.finish();
}

bool Machine::on_fiber() const { return current != nullptr && current->fiber.holds(__builtin_frame_address(0)); }

void Machine::global_access(Shadow::Kind kind, const char* what, const void* address, size_t bytes, const void* pc) {
  if (global_shadow != nullptr) global_shadow->access(*current, kind, what, address, bytes, pc);
  if (kind != Shadow::kRead) written_.add(address, bytes);
  if (kind == Shadow::kWrite || !config_.pdl || !written_before_.overlaps(address, bytes)) return;
  for (const Thread* t : current->owner->threads) {  // it has waited, or comes after a barrier behind one that has
    if (t->grid_waited != 0 && (t == current || (*current->seen)[t->tid] >= t->grid_waited)) return;
  }
  fail_current(format("missing griddepcontrol.wait: %s of global memory that the kernel before, %s, writes", what,
                      where(kernel_before_).c_str()), pc);
}

void Machine::issue(std::shared_ptr<AsyncOp> op) {
  op->issuer->pending.push_back(op);
  async_.push_back(op);
  if (moment_ == Moment::kEarliest) force(*op);
}

void Machine::force(AsyncOp& op) {
  if (op.kind == AsyncOp::kWgmma) {  // those of one warpgroup happen in order
    for (const auto& earlier : std::vector(op.issuer->pending)) {
      if (earlier.get() == &op) break;
      if (earlier->kind == AsyncOp::kWgmma) force(*earlier);
    }
  }
  const auto keep = std::find_if(async_.begin(), async_.end(), [&](const auto& p) { return p.get() == &op; });
  if (keep == async_.end()) return;  // it has happened
  const std::shared_ptr<AsyncOp> alive = *keep;
  async_.erase(keep);
  std::erase(op.issuer->pending, alive);
  op.effect();
}

void Machine::report_deadlock(const char* reason) {
  std::vector<std::pair<std::string, std::vector<const Thread*>>> groups;
  std::vector<const Thread*> waiting;
  for (const auto& cluster : clusters_) {
    for (const auto& thread : cluster->threads) {
      if (!thread->finished) waiting.push_back(thread.get());
    }
  }
  for (const Thread* thread : waiting) {
    const std::string at = std::string(thread->wait.what ? thread->wait.what : "?") + " at " + where(thread->wait.pc) +
                           (thread->wait.detail.empty() ? "" : " (" + thread->wait.detail + ")");
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == at; });
    if (group == groups.end()) group = groups.insert(groups.end(), {at, {}});
    group->second.push_back(thread);
  }
  std::string text = format("simt: deadlock, %s, in the launch of %s", reason, where(kernel_address_).c_str());
  if (rank >= 0) text += format(" by rank %d", rank);
  for (const auto& [at, threads] : groups)
    text += format("\n  %zu threads wait in %s; the first is %s", threads.size(), at.c_str(), describe(*threads[0]).c_str());
  throw std::runtime_error(text);
}

Cluster* Machine::cluster_of(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  for (const auto& cluster : clusters_) {
    if (p >= cluster->arena && p < cluster->arena + cluster->blocks.size() * cluster->stride) return cluster.get();
  }
  return nullptr;
}

}  // namespace simt
