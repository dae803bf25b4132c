#include "cpu/common/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace tilestream::cpu {
namespace {

// About 100 us of pause instructions: longer than the Python between two ops of a step, shorter than anyone's idle.
constexpr int kSpinsBeforeSleep = 4000;
// A thread that waits for another's work yields sooner: the other may need this very CPU.
constexpr int kSpinsBeforeYield = 400;
constexpr int kMaxThreads = 256;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The CPUs this process may use, as they are when the first team starts.
const std::vector<int>& usable_cpus() {
  static const std::vector<int> cpus = [] {
    std::vector<int> found;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
      }
    }
    if (found.empty()) found.resize(std::max(1u, std::thread::hardware_concurrency()));
    return found;
  }();
  return cpus;
}

// Workers get a CPU each when the team is as large as the process's share of the machine: left to itself the system may
// wake a worker on the launching thread's CPU, and then the two take turns. The launching thread is the user's and stays
// free; it ends up on the CPU that is left. Smaller teams stay free too, for several of them may share the CPUs.
// TILESTREAM_PIN_THREADS=0 leaves all threads free.
bool pins_workers(int team_size) {
  const char* env = std::getenv("TILESTREAM_PIN_THREADS");
  return team_size == int(usable_cpus().size()) && (env == nullptr || env[0] != '0');
}

void pin_to_cpu(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);  // a refusal only costs speed
}

int default_num_threads() {
  if (const char* env = std::getenv("TILESTREAM_NUM_THREADS")) {
    const int n = std::atoi(env);
    if (n >= 1 && n <= kMaxThreads) return n;
  }
  return std::min(int(usable_cpus().size()), kMaxThreads);
}

// A launch is one task per worker. Worker w takes task w when it is there in time; a task that nobody has begun is
// taken by whoever is idle, the caller first. So a worker that the system has scheduled out delays nobody: on a busy
// machine a launch falls back towards one thread's time instead of waiting a scheduler's tick.
class Team {
 public:
  explicit Team(int size) : size_(size), spins_(size <= int(usable_cpus().size()) ? kSpinsBeforeSleep : 1), claimed_(size) {
    const bool pins = pins_workers(size);
    for (int w = 1; w < size; ++w) {
      threads_.emplace_back([this, w] { work(w); });
      if (pins) pin_to_cpu(threads_.back(), usable_cpus()[w]);
    }
  }
  ~Team() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& t : threads_) t.join();
  }
  int size() const { return size_; }

  // together: every task on a thread of its own, so that tasks may meet at barrier().
  void run(TaskFn fn, void* context, int num_tasks, bool together) {
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    fn_ = fn;
    context_ = context;
    num_tasks_ = num_tasks;
    done_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    for (int task = num_tasks; task < size_; ++task) claimed_[task].epoch.store(epoch, std::memory_order_relaxed);
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) epoch_.notify_all();
    for (int task = 0; task < (together ? 1 : num_tasks); ++task) try_task(task, epoch);
    for (int spins = 0; done_.load(std::memory_order_acquire) != num_tasks; ++spins) relax(spins);
  }

  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_tasks_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) relax(spins);
  }

 private:
  // The last launch in which the task was begun, or in which it did not exist.
  struct alignas(64) Claim {
    std::atomic<uint32_t> epoch{0};
  };

  void relax(int spins) const {
    if (spins < std::min(spins_, kSpinsBeforeYield)) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }

  // Every launch leaves every claim at its own number, so a thread that is late by a launch claims nothing. A claim that
  // succeeds keeps the launch from ending, and with it fn_ and context_ as they are.
  void try_task(int task, uint32_t epoch) {
    uint32_t previous = epoch - 1;
    if (!claimed_[task].epoch.compare_exchange_strong(previous, epoch, std::memory_order_acq_rel)) return;
    fn_(context_, task, num_tasks_);
    done_.fetch_add(1, std::memory_order_release);
  }

  void work(int worker) {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < spins_; ++spins) pause_cpu();
      while (epoch_.load(std::memory_order_acquire) == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      try_task(worker, seen);
    }
  }

  const int size_, spins_;
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int num_tasks_ = 1;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<Claim> claimed_;
  std::vector<std::thread> threads_;
};

std::mutex launch_mutex;
Team* team = nullptr;
int wanted_threads = 0;
thread_local bool alone = false;  // this launch runs on the caller only

// A forked child has none of the parent's workers: it starts a team of its own at its first launch.
void forget_team_in_child() {
  team = nullptr;
  new (&launch_mutex) std::mutex;
}

void ensure_team() {
  if (wanted_threads == 0) {
    wanted_threads = default_num_threads();
    pthread_atfork(nullptr, nullptr, forget_team_in_child);
  }
  if (team != nullptr && team->size() == wanted_threads) return;
  delete team;
  team = new Team(wanted_threads);
}

}  // namespace

int num_threads() {
  std::lock_guard lock(launch_mutex);
  return wanted_threads == 0 ? default_num_threads() : wanted_threads;
}

void set_num_threads(int num) {
  std::lock_guard lock(launch_mutex);
  ensure_team();
  wanted_threads = std::clamp(num, 1, kMaxThreads);
}

void run_parallel(TaskFn fn, void* context, int max_workers, bool together) {
  if (max_workers <= 1) {
    alone = true;
    fn(context, 0, 1);
    alone = false;
    return;
  }
  std::lock_guard lock(launch_mutex);
  ensure_team();
  team->run(fn, context, std::min(max_workers, team->size()), together);
}

void team_barrier() {
  if (!alone) team->barrier();
}

void* scratch(Scratch slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[2];
  Buffer& b = buffers[int(slot)];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, b.size);
    if (b.data == nullptr) throw std::bad_alloc();
  }
  return b.data;
}

}  // namespace tilestream::cpu
