// The CPU backend's workers: one team of threads for all ops, and their scratch memory.
//
// A team spins for a short while after a launch, so that the next op of the same step starts within about a
// microsecond, then sleeps. Compiled once, for the base instruction set; kernels see only these declarations.
#pragma once

#include <cstddef>

namespace tilestream::cpu {

// Throws std::invalid_argument where TILESTREAM_NUM_THREADS or TILESTREAM_PIN_THREADS is not one of the allowed values.
int num_threads();
// 1..256; takes effect at the next launch. Default: TILESTREAM_NUM_THREADS, else one for every core this process may use.
// More than there are CPUs change how work is cut, not how many threads run: those there are share the tasks.
void set_num_threads(int num);

using TaskFn = void (*)(void* context, int worker, int num_workers);
// Runs the W = min(max_workers, num_threads()) tasks fn(context, w, W) on the team, the caller included; returns when all
// are done. Tasks must not wait for one another, because a thread may run several: work in phases is several launches.
// Launches from several host threads take turns. fn must not throw or launch.
void run_parallel(TaskFn fn, void* context, int max_workers);

// f(int worker, int num_workers) on the team. `static`: each kernel file keeps its own instance, compiled for its level.
template <class F>
static inline void call_task(void* f, int worker, int num_workers) {
  (*static_cast<F*>(f))(worker, num_workers);
}
template <class F>
static inline void parallel(int max_workers, F& f) {
  run_parallel(call_task<F>, &f, max_workers);
}

// Grow-only, 64-byte aligned memory of the calling thread. kLaunch: filled by the launching thread and read by
// the team (activations quantised once, say); kWorker: private to a task while it runs.
enum class Scratch { kLaunch = 0, kWorker = 1 };
void* scratch(Scratch slot, size_t bytes);

// The half-open share of `num` items that worker `worker` of `num_workers` takes, in whole multiples of `step`.
struct Share { long begin, end; };
static inline Share share_of(long num, int worker, int num_workers, long step = 1) {
  const long blocks = (num + step - 1) / step;
  const long begin = blocks * worker / num_workers * step, end = blocks * (worker + 1) / num_workers * step;
  return {begin < num ? begin : num, end < num ? end : num};
}

}  // namespace tilestream::cpu
