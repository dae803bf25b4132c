#include "cpu/common/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/common/cpus.h"
#include "cpu/common/pause.h"

namespace tilestream::cpu {
namespace {

// About 100 us of pause instructions: longer than the Python between two ops of a step, shorter than anyone's idle.
constexpr int kSpinsBeforeSleep = 4000;
// A thread that waits for another's work yields sooner: the other may need this very CPU.
constexpr int kSpinsBeforeYield = 400;
constexpr int kMaxThreads = 256;

// An environment variable's whole number, or `otherwise` where it is not set.
int read_environment(const char* name, int lowest, int highest, int otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  const char* end = text + std::strlen(text);
  int value = 0;
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < lowest || value > highest) {
    throw std::invalid_argument(std::string(name) + " is '" + text + "'; allowed: " + std::to_string(lowest) + " to " +
                                std::to_string(highest));
  }
  return value;
}

struct Settings {
  int num_threads;
  bool pins;
};

const Settings& settings() {
  static const Settings found{
      read_environment("TILESTREAM_NUM_THREADS", 1, kMaxThreads, std::min(usable_cpus().num_cores, kMaxThreads)),
      read_environment("TILESTREAM_PIN_THREADS", 0, 1, 1) == 1};
  return found;
}

// Workers get a CPU each when the team fills the process's share of the machine: left to itself the system may wake a
// worker on the launching thread's CPU, and then the two take turns. The launching thread is the user's and stays
// free; where it has moved onto a worker's CPU, that worker makes room. Smaller teams stay free too, for several of them
// may share the CPUs.
// TILESTREAM_PIN_THREADS=0 leaves all threads free.
bool pins_workers(int num_threads) { return settings().pins && num_threads >= usable_cpus().num_cores; }

void pin_to_cpu(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);  // a refusal only costs speed
}

// A launch is one task per worker. Of T threads (never more than there are CPUs), thread t takes tasks t, t + T, ... when
// it is there in time; a task that nobody has begun is taken by the caller. So a worker that the system has scheduled out
// delays nobody: on a busy machine a launch falls back towards one thread's time instead of waiting a scheduler's tick.
class Team {
 public:
  explicit Team(int size) : size_(size), num_threads_(std::min(size, int(usable_cpus().cpus.size()))), claimed_(size) {
    if (pins_workers(num_threads_)) cpu_of_.assign(usable_cpus().cpus.begin(), usable_cpus().cpus.begin() + num_threads_);
    for (int t = 1; t < num_threads_; ++t) {
      threads_.emplace_back([this, t] { work(t); });
      if (!cpu_of_.empty()) pin_to_cpu(threads_.back(), cpu_of_[t]);
    }
  }
  ~Team() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& t : threads_) t.join();
  }
  int size() const { return size_; }

  void run(TaskFn fn, void* context, int num_tasks) {
    make_room();
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    fn_ = fn;
    context_ = context;
    num_tasks_ = num_tasks;
    done_.store(0, std::memory_order_relaxed);
    for (int task = num_tasks; task < size_; ++task) claimed_[task].epoch.store(epoch, std::memory_order_relaxed);
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) epoch_.notify_all();
    try_own_tasks(0, epoch);
    for (int task = 0; task < num_tasks; ++task) try_task(task, epoch);
    for (int spins = 0; done_.load(std::memory_order_acquire) != num_tasks; ++spins) relax(spins);
  }

 private:
  // The last launch in which the task was begun, or in which it did not exist.
  struct alignas(64) Claim {
    std::atomic<uint32_t> epoch{0};
  };

  // A pinned worker whose CPU the launching thread runs on goes to the one that this leaves.
  void make_room() {
    const int here = cpu_of_.empty() ? -1 : sched_getcpu();
    for (int t = 1; t < int(cpu_of_.size()) && here != cpu_of_[0]; ++t) {
      if (cpu_of_[t] != here) continue;
      std::swap(cpu_of_[0], cpu_of_[t]);
      pin_to_cpu(threads_[t - 1], cpu_of_[t]);
    }
  }

  static void relax(int spins) {
    if (spins < kSpinsBeforeYield) {
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

  void try_own_tasks(int thread, uint32_t epoch) {
    for (int task = thread; task < size_; task += num_threads_) try_task(task, epoch);
  }

  void work(int thread) {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < kSpinsBeforeSleep; ++spins) {
        pause_cpu();
      }
      while (epoch_.load(std::memory_order_acquire) == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      try_own_tasks(thread, seen);
    }
  }

  const int size_, num_threads_;
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int num_tasks_ = 1;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<Claim> claimed_;
  std::vector<int> cpu_of_;  // of pinned teams: [0] is left to the launching thread
  std::vector<std::thread> threads_;
};

std::mutex launch_mutex;
Team* team = nullptr;
int wanted_threads = 0;

// A forked child has none of the parent's workers: it starts a team of its own at its first launch.
void forget_team_in_child() {
  team = nullptr;
  new (&launch_mutex) std::mutex;
}

void ensure_team() {
  if (wanted_threads == 0) {
    wanted_threads = settings().num_threads;
    pthread_atfork(nullptr, nullptr, forget_team_in_child);
  }
  if (team != nullptr && team->size() == wanted_threads) return;
  delete team;
  team = new Team(wanted_threads);
}

}  // namespace

int num_threads() {
  std::lock_guard lock(launch_mutex);
  return wanted_threads == 0 ? settings().num_threads : wanted_threads;
}

void set_num_threads(int num) {
  std::lock_guard lock(launch_mutex);
  ensure_team();
  wanted_threads = std::clamp(num, 1, kMaxThreads);
}

void run_parallel(TaskFn fn, void* context, int max_workers) {
  if (max_workers <= 1) return fn(context, 0, 1);
  std::lock_guard lock(launch_mutex);
  ensure_team();
  team->run(fn, context, std::min(max_workers, team->size()));
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
