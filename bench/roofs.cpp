// What a machine allows: rates of reading and copying memory, and of multiply-adds that never leave the registers.
// bench/roofs.py compiles this for the machine it runs on and calls the three functions at the end.

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kPasses = 7;  // the best one counts: a limit is what the machine can do
constexpr size_t kHugePageBytes = 2 << 20;

typedef uint64_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

// Keeps a result alive.
std::atomic<uint64_t> sink;

// Best seconds of `pass(thread)` done by all threads together, each on a CPU of its own.
double best_seconds(int num_threads, const std::function<void(int)>& pass) {
  cpu_set_t usable;
  sched_getaffinity(0, sizeof(usable), &usable);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &usable)) cpus.push_back(cpu);
  }
  std::atomic<int> arrived{0};
  const auto meet = [&](int round) {
    arrived.fetch_add(1);
    while (arrived.load() < round * num_threads) {
    }
  };
  double best = 1e30;
  const auto work = [&](int thread) {
    cpu_set_t own;
    CPU_ZERO(&own);
    CPU_SET(cpus[thread % cpus.size()], &own);
    pthread_setaffinity_np(pthread_self(), sizeof(own), &own);
    for (int i = 0; i < kPasses; ++i) {
      meet(2 * i + 1);
      const auto begin = std::chrono::steady_clock::now();
      pass(thread);
      meet(2 * i + 2);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      if (thread == 0 && i > 0) best = std::min(best, seconds.count());  // the first pass warms the caches
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(work, thread);
  for (auto& thread : threads) thread.join();
  return best;
}

struct Memory {
  explicit Memory(size_t num_bytes) : size((num_bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes) {
    data = static_cast<char*>(std::aligned_alloc(kHugePageBytes, size));
    madvise(data, size, MADV_HUGEPAGE);
    std::memset(data, 1, size);
  }
  ~Memory() { std::free(data); }
  size_t size;
  char* data;
};

// Small buffers are passed over again until a pass is long beside the meeting of the threads.
int repeats_for(size_t num_bytes) { return int(std::max<size_t>(1, (16 << 20) / num_bytes)); }

void read(const char* data, size_t num_bytes, int repeats) {
  constexpr int kLanes = 8;
  Words sums[kLanes] = {};
  const auto* words = reinterpret_cast<const Words*>(data);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (size_t i = 0; i + kLanes <= num_bytes / sizeof(Words); i += kLanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] ^= words[i + lane];
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler must read it all again
  }
  for (const Words& sum : sums) sink += sum[0] + sum[7];
}

constexpr long kSteps = 2'000'000;
constexpr int kChains = 12;  // of dependent multiply-adds: more than latency times issue width, fewer than registers

// step(accumulator) on kChains accumulators, kSteps times in all.
template <typename Vector, typename Step>
void chains(Vector start, Step step) {
  Vector sums[kChains];
  for (Vector& sum : sums) sum = start;
  for (long i = 0; i < kSteps / kChains; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = step(sums[chain]);
  }
  uint64_t word = 0;
  for (Vector& sum : sums) {
    std::memcpy(&word, &sum, sizeof(word));
    sink += word;
  }
}

// Multiplies and adds of one step.
int fp32_steps() {
  const Floats factor = Floats{} + 0.999f, addend = Floats{} + 0.001f;
  chains(Floats{}, [=](Floats sum) { return sum * factor + addend; });
  return 2 * 16;
}

int bf16_steps() {
#if defined(__AVX512BF16__)
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80);
  chains(_mm512_setzero_ps(), [=](__m512 sum) { return _mm512_dpbf16_ps(sum, x, x); });
  return 2 * 32;
#else
  return fp32_steps();  // no multiply-add of its own
#endif
}

int int8_steps() {
#if defined(__AVX512VNNI__)
  const __m512i x = _mm512_set1_epi8(1);
  chains(_mm512_setzero_si512(), [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, x); });
  return 2 * 64;
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  chains(_mm256_setzero_si256(), [=](__m256i sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_xor_si256(x, sum)), ones));
  });
  return 2 * 32;
#else
  return fp32_steps();
#endif
}

}  // namespace

// Bytes per second of all threads together, each reading its part of as many bytes again and again.
extern "C" double read_rate(size_t num_bytes, int num_threads) {
  const Memory memory(num_bytes);
  const size_t part = num_bytes / num_threads / 64 * 64;
  const int repeats = repeats_for(num_bytes);
  const double seconds = best_seconds(num_threads, [&](int thread) { read(memory.data + thread * part, part, repeats); });
  return double(part) * num_threads * repeats / seconds;
}

// The same for a copy; num_bytes and the rate count bytes read and bytes written.
extern "C" double copy_rate(size_t num_bytes, int num_threads) {
  const Memory source(num_bytes / 2), target(num_bytes / 2);
  const size_t part = num_bytes / 2 / num_threads / 64 * 64;
  const int repeats = repeats_for(num_bytes);
  const double seconds = best_seconds(num_threads, [&](int thread) {
    for (int i = 0; i < repeats; ++i) std::memcpy(target.data + thread * part, source.data + thread * part, part);
  });
  return 2.0 * double(part) * num_threads * repeats / seconds;
}

// Operations per second, a multiply and an add counted as two; bits: 32 (float), 16 (bfloat16) or 8 (integer).
extern "C" double arithmetic_rate(int bits, int num_threads) {
  std::atomic<int> ops_per_step{0};
  const double seconds = best_seconds(num_threads, [&](int) {
    ops_per_step = bits == 8 ? int8_steps() : bits == 16 ? bf16_steps() : fp32_steps();
  });
  return double(kSteps / kChains * kChains) * ops_per_step * num_threads / seconds;
}
