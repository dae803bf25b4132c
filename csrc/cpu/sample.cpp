// Sampling on the CPU: filters without sorting, a seeded draw, log-probabilities. Contract: sample.h.
//
// Work: rows go to workers; the rows left over (fewer than workers) are each cut into chunks for all of them.
// One pass over the logits gives the log-sum-exp and, for each block, the maxima of its 16 lanes. Then
//   greedy   the block that holds the maximum is searched;
//   top-k    the k-th largest maximum bounds the k-th largest logit from below, so that few blocks are read
//            again; a radix select on the float bits of what they hold gives the exact threshold;
//   dense    (no top-k) top-p sums probability mass per chunk and bin of 1/11.5 octave, then selects inside
//            one bin; the draw walks the chunk in which it falls.
// Masses are fixed point, so their sums do not depend on the order, hence not on the number of threads; the
// log-sum-exp is summed per chunk and then in chunk order.
// Sources: Philox4x32-10, Salmon et al. 2011; top-p, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
// Reads the logits once (three times when dense); bound by exp2 when logprobs are wanted, else by memory.
#include "tilestream/sample.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/common/thread_pool.h"
#include "cpu/sample_row.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kMinLogitsPerWorker = 16384;  // about 5 us of work
constexpr float kLog2E = 1.44269504f;
// A weight in [0, 1] plus this has an ulp of 2^-44: its bits are the weight in fixed point. 2^20 of them fit.
constexpr double kFixedPoint = 384.0;

struct Crew {
  int worker, num_workers;
  void barrier() const {
    if (num_workers > 1) team_barrier();
  }
};

// ---- statistics ---------------------------------------------------------------------------------

// Lane maxima of one block. Returns `probe` plus the logits, scaled down so far that only a NaN makes it NaN
// (or both infinities, which is as bad).
F32x16 block_statistics(Row& r, const float* p, long block, F32x16 probe) {
  const F32x16 tiny = set1(0x1p-120f);
  F32x16 m = set1(-INFINITY);
  for (long i = 0; i < kBlock; i += kLanes) {
    const F32x16 v = load(p + i);
    m = max(v, m);
    probe = fma(v, tiny, probe);
  }
  store(r.lane_max + block * kLanes, m);
  return probe;
}

// Lane maxima, maximum and, when wanted, the sum of exp(x - maximum) of one chunk; copied to `copy`, if any.
void chunk_statistics(Row& r, const float* x, long chunk, bool want_sum, float* copy) {
  alignas(64) float padded[kBlock];
  const long first = chunk * (kChunk / kBlock), last = block_end(r, chunk);
  F32x16 chunk_max = set1(-INFINITY), probe = zero();
  for (long b = first; b < last; ++b) {
    const float* p = block_of(r, x, b, padded);
    probe = block_statistics(r, p, b, probe);
    chunk_max = max(chunk_max, load(r.lane_max + b * kLanes));
    if (copy != nullptr) {
      const long num = r.vocab_size - b * kBlock;
      std::memcpy(copy + b * kBlock, p, size_t(num < kBlock ? num : kBlock) * sizeof(float));
    }
  }
  r.chunk_max[chunk] = reduce_max(chunk_max);
  const float probed = reduce_add(probe);
  double total = probed == probed ? 0.0 : NAN;
  const F32x16 shift = set1(std::fmax(r.chunk_max[chunk], -FLT_MAX)), log2e = set1(kLog2E);
  F32x16 sum[4] = {zero(), zero(), zero(), zero()};
  for (long b = first; want_sum && b < last; ++b) {
    const float* p = block_of(r, x, b, padded);
    for (long i = 0; i < kBlock; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        sum[j] = add(sum[j], exp2(mul(sub(load(p + i + j * kLanes), shift), log2e)));
      }
    }
  }
  float lanes[kLanes];
  for (int j = 0; j < 4; ++j) {
    store(lanes, sum[j]);
    for (long i = 0; i < kLanes; ++i) total += lanes[i];
  }
  r.chunk_sum[chunk] = total;
}

float largest_lane(const Row& r) {
  F32x16 m = set1(-INFINITY);
  for (long b = 0; b < r.num_blocks; ++b) m = max(m, load(r.lane_max + b * kLanes));
  return reduce_max(m);
}

// Natural log of the sum of exp(x), from the chunks in order. `valid`: no NaN, no +inf, something above -inf.
double log_sum_exp(const Row& r, bool& valid) {
  double largest = -INFINITY, sum = 0.0;
  for (long c = 0; c < r.num_chunks; ++c) largest = r.chunk_max[c] > largest ? r.chunk_max[c] : largest;
  for (long c = 0; c < r.num_chunks; ++c) sum += r.chunk_sum[c] * std::exp(r.chunk_max[c] - largest);
  valid = std::fabs(largest) <= FLT_MAX && sum == sum;
  return largest + std::log(sum);
}

// ---- masses and the draw ------------------------------------------------------------------------

// 64 random bits of Philox4x32-10 with key = seed, counter = position.
uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1,
                              uint32_t(a)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t(c[1]) << 32 | c[0];
}

// floor(u * total) for u = bits / 2^64.
uint64_t scaled_draw(uint64_t bits, uint64_t total) {
  return uint64_t((unsigned __int128)bits * total >> 64);
}

// The least mass that reaches the fraction top_p of `total`.
uint64_t needed_mass(float top_p, uint64_t total) {
  const double need = std::ceil(double(top_p) * double(total));
  return need < 1.0 ? 1 : need < double(total) ? uint64_t(need) : total;
}

// w[i] = exp((x[i] - max) / temperature), n a multiple of 16.
void weights(const Row& r, const float* x, float* w, long n) {
  const F32x16 m = set1(r.max), scale = set1(r.inverse_scale);
  for (long i = 0; i < n; i += kLanes) store(w + i, exp2(mul(sub(load(x + i), m), scale)));
}

// Where each logit lies, in bins below the maximum. Monotone, so that bins are ranges of logits.
inline F32x16 bin_position(const Row& r, F32x16 x) {
  return min(mul(sub(set1(r.max), x), set1(r.inverse_scale * kBinsPerOctave)), set1(float(kBins - 1)));
}

inline int64_t fixed_point(float weight) {
  const double shifted = double(weight) + kFixedPoint, zero_point = kFixedPoint;
  int64_t bits, zero_bits;
  std::memcpy(&bits, &shifted, 8);
  std::memcpy(&zero_bits, &zero_point, 8);
  return bits - zero_bits;
}

// Masses of a block's kept logits, 0 for the others.
void kept_masses(const Row& r, const float* x, uint64_t* mass) {
  alignas(64) float w[kBlock];
  weights(r, x, w, kBlock);
  for (long i = 0; i < kBlock; ++i) {
    const int64_t m = fixed_point(x[i] >= r.threshold ? w[i] : 0.0f);
    mass[i] = m >= r.least_mass ? m : 0;
  }
}

// Masses of the first n list entries; returns their sum.
uint64_t list_masses(Row& r, long n) {
  uint64_t total = 0;
  float w[kLanes];
  for (long i = 0; i < n; i += kLanes) {
    weights(r, r.list_x + i, w, kLanes);
    for (long j = i; j < n && j < i + kLanes; ++j) total += r.list_mass[j] = uint64_t(fixed_point(w[j - i]));
  }
  return total;
}

// Top-p, min-p and the draw over a list of n candidates, the row's maximum among them.
int64_t draw_from_list(Row& r, long n, float top_p, uint64_t random_bits) {
  const uint64_t all = list_masses(r, n);
  if (top_p < 1.0f) r.threshold = weighted_threshold(r.list_x, r.list_mass, n, needed_mass(top_p, all));
  uint64_t total = 0;
  for (long i = 0; i < n; ++i) {
    if (r.list_x[i] < r.threshold || r.list_mass[i] < uint64_t(r.least_mass)) r.list_mass[i] = 0;
    total += r.list_mass[i];
  }
  const uint64_t target = scaled_draw(random_bits, total);
  long i = 0;
  for (uint64_t below = r.list_mass[0]; below <= target; below += r.list_mass[i]) ++i;
  return r.list_id[i];
}

// The mass of one chunk, by bin. Neighbours often share a bin: in tables of their own, they need not wait for
// the previous one's store.
void histogram_chunk(Row& r, long chunk) {
  constexpr int kTables = 4;
  alignas(64) float padded[kBlock], w[kBlock], position[kBlock];
  alignas(64) int64_t mass[kBlock];
  alignas(64) int32_t bins[kBlock];
  alignas(64) uint64_t tables[kTables][kBins] = {};
  for (long b = chunk * (kChunk / kBlock); b < block_end(r, chunk); ++b) {
    const float* x = block_of(r, r.x, b, padded);
    weights(r, x, w, kBlock);
    for (long i = 0; i < kBlock; i += kLanes) store(position + i, bin_position(r, load(x + i)));
    for (long i = 0; i < kBlock; ++i) mass[i] = fixed_point(w[i]);
    for (long i = 0; i < kBlock; ++i) bins[i] = int32_t(position[i]);
    for (long i = 0; i < kBlock; i += kTables) {
#pragma GCC unroll 4
      for (int t = 0; t < kTables; ++t) tables[t][bins[i + t]] += uint64_t(mass[i + t]);
    }
  }
  uint64_t* histogram = r.histogram + chunk * kBins;
  for (int i = 0; i < kBins; ++i) histogram[i] = tables[0][i] + tables[1][i] + tables[2][i] + tables[3][i];
}

// The bin in which top-p ends, and what it still needs from there; chunk_mass becomes the mass above the bin.
void find_bin(Row& r, float top_p) {
  uint64_t bins[kBins] = {}, total = 0;
  for (long c = 0; c < r.num_chunks; ++c) {
    for (int i = 0; i < kBins; ++i) bins[i] += r.histogram[c * kBins + i];
  }
  for (int i = 0; i < kBins; ++i) total += bins[i];
  r.bin_need = needed_mass(top_p, total);
  for (r.bin = 0; bins[r.bin] < r.bin_need; ++r.bin) r.bin_need -= bins[r.bin];
  for (long c = 0; c < r.num_chunks; ++c) {
    r.chunk_mass[c] = 0;
    for (int i = 0; i < r.bin; ++i) r.chunk_mass[c] += r.histogram[c * kBins + i];
  }
}

// Lists the logits of r.bin in the chunks [begin, end), from position begin * kChunk on; returns how many.
long collect_bin(Row& r, long begin, long end) {
  alignas(64) float padded[kBlock];
  const F32x16 low = set1(float(r.bin)), high = set1(std::nextafterf(float(r.bin + 1), 0.0f));
  long n = begin * kChunk;
  for (long b = begin * (kChunk / kBlock); b < block_end(r, end - 1); ++b) {
    const float* x = block_of(r, r.x, b, padded);
    for (long i = 0; i < kBlock; i += kLanes) {
      float inside[kLanes];  // >= 0: the logit is in the bin
      const F32x16 position = bin_position(r, load(x + i));
      const F32x16 depth = min(sub(position, low), sub(high, position));
      if (!(reduce_max(depth) >= 0.0f)) continue;
      store(inside, depth);
      for (long j = 0; j < kLanes; ++j) {  // no branch: it could not be predicted
        r.list_x[n] = x[i + j];
        r.list_id[n] = int32_t(b * kBlock + i + j);
        n += (inside[j] >= 0.0f) & (x[i + j] > -INFINITY);
      }
    }
  }
  return n - begin * kChunk;
}

// Selects inside r.bin from the workers' lists: sets r.threshold, and adds the kept mass to its chunks.
void finish_bin(Row& r, int num_workers) {
  long n = 0;
  for (int w = 0; w < num_workers; ++w) {
    const long begin = share_of(r.num_chunks, w, num_workers).begin * kChunk;
    std::memmove(r.list_x + n, r.list_x + begin, size_t(r.list_count[w]) * sizeof(float));
    std::memmove(r.list_id + n, r.list_id + begin, size_t(r.list_count[w]) * sizeof(int32_t));
    n += r.list_count[w];
  }
  list_masses(r, n);
  r.threshold = weighted_threshold(r.list_x, r.list_mass, n, r.bin_need);
  for (long i = 0; i < n; ++i) {
    if (r.list_x[i] >= r.threshold) r.chunk_mass[r.list_id[i] / kChunk] += r.list_mass[i];
  }
}

// The kept mass of one chunk, from the logits.
void sum_chunk(Row& r, long chunk) {
  alignas(64) float padded[kBlock];
  alignas(64) uint64_t mass[kBlock];
  uint64_t sum = 0;
  for (long b = chunk * (kChunk / kBlock); b < block_end(r, chunk); ++b) {
    kept_masses(r, block_of(r, r.x, b, padded), mass);
    for (long i = 0; i < kBlock; ++i) sum += mass[i];
  }
  r.chunk_mass[chunk] = sum;
}

int64_t draw_dense(const Row& r, uint64_t random_bits) {
  uint64_t total = 0, below = 0;
  for (long c = 0; c < r.num_chunks; ++c) total += r.chunk_mass[c];
  const uint64_t target = scaled_draw(random_bits, total);
  long chunk = 0;
  while (below + r.chunk_mass[chunk] <= target) below += r.chunk_mass[chunk++];
  alignas(64) float padded[kBlock];
  alignas(64) uint64_t mass[kBlock];
  for (long b = chunk * (kChunk / kBlock); b < block_end(r, chunk); ++b) {
    kept_masses(r, block_of(r, r.x, b, padded), mass);
    for (long i = 0; i < kBlock; ++i) {
      below += mass[i];
      if (below > target) return b * kBlock + i;
    }
  }
  return -1;  // not reached: the chunk's masses sum to more than target - below
}

// ---- penalties ----------------------------------------------------------------------------------

// Each distinct token of the row's history, with how often the output has it, into the hash table r.history.
void count_history(Row& r, const SampleParams& p, long b) {
  for (long i = 0; i < r.history_capacity; ++i) r.history[i] = {-1, 0};
  const int32_t* tokens = p.history + p.history_indptr[b];
  const long num = p.history_indptr[b + 1] - p.history_indptr[b], mask = r.history_capacity - 1;
  for (long i = 0; i < num; ++i) {
    long slot = long(uint32_t(tokens[i]) * 0x9E3779B1u) & mask;
    while (r.history[slot].token != -1 && r.history[slot].token != tokens[i]) slot = (slot + 1) & mask;
    r.history[slot].token = tokens[i];
    r.history[slot].output_count += i >= p.history_prompt_len[b];
  }
}

bool has_penalties(const SampleParams& p, long b) {
  return p.repetition_penalty != nullptr && p.history_indptr[b + 1] > p.history_indptr[b] &&
         (p.repetition_penalty[b] != 1.0f || p.presence_penalty[b] != 0.0f || p.frequency_penalty[b] != 0.0f);
}

// Changes r.copy at the tokens of the history, and the lane maxima over them.
void apply_penalties(Row& r, const SampleParams& p, long b) {
  count_history(r, p, b);
  for (long slot = 0; slot < r.history_capacity; ++slot) {
    const HistoryEntry e = r.history[slot];
    if (e.token < 0) continue;
    float x = r.copy[e.token];
    x = x > 0.0f ? x / p.repetition_penalty[b] : x * p.repetition_penalty[b];
    if (e.output_count > 0) x -= p.presence_penalty[b] + p.frequency_penalty[b] * float(e.output_count);
    r.copy[e.token] = x;
    const long block = e.token / kBlock, lane = e.token % kLanes;
    float m = -INFINITY;
    for (long i = block * kBlock + lane; i < r.vocab_size && i < (block + 1) * kBlock; i += kLanes) {
      m = r.copy[i] > m ? r.copy[i] : m;
    }
    r.lane_max[block * kLanes + lane] = m;
  }
}

// ---- one row ------------------------------------------------------------------------------------

// The lowest id whose logit is r.max.
int64_t arg_max(const Row& r) {
  long block = 0;
  while (reduce_max(load(r.lane_max + block * kLanes)) != r.max) ++block;
  long i = block * kBlock;
  while (r.x[i] != r.max) ++i;
  return i;
}

// The num_top_logprobs most likely tokens of the raw logits; -1 and -inf where there are fewer.
void top_logprobs(Row& r, const SampleParams& p, long b, double lse) {
  const long k = p.num_top_logprobs;
  if (k == 0) return;
  const float* raw = p.logits + b * p.logits_row_stride;
  const long n = list_top_k(r, raw, k < r.vocab_size ? k : r.vocab_size);
  for (long i = 1; i < n; ++i) {  // insertion sort: stable, so equal values stay in id order
    const float x = r.list_x[i];
    const int32_t id = r.list_id[i];
    long j = i;
    for (; j > 0 && r.list_x[j - 1] < x; --j) {
      r.list_x[j] = r.list_x[j - 1];
      r.list_id[j] = r.list_id[j - 1];
    }
    r.list_x[j] = x;
    r.list_id[j] = id;
  }
  for (long i = 0; i < k; ++i) {
    p.top_ids[b * k + i] = i < n ? r.list_id[i] : -1;
    p.top_logprobs[b * k + i] = i < n ? float(double(r.list_x[i]) - lse) : -INFINITY;
  }
}

void write_token(const SampleParams& p, long b, int64_t token, double lse) {
  p.tokens[b] = token;
  if (p.logprobs != nullptr) {
    p.logprobs[b] = token < 0 ? NAN : float(double(p.logits[b * p.logits_row_stride + token]) - lse);
  }
}

void write_invalid(const SampleParams& p, long b) {
  write_token(p, b, -1, 0.0);
  for (long i = b * p.num_top_logprobs; i < (b + 1) * p.num_top_logprobs; ++i) {
    p.top_ids[i] = -1;
    p.top_logprobs[i] = NAN;
  }
}

uint64_t random_bits(const SampleParams& p, long b) {
  return philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
}

// All that needs no second pass over the logits, by one worker. Sets r.dense when the draw is still to come.
void decide(Row& r, const SampleParams& p, long b, double lse, bool valid) {
  r.dense = false;
  if (!valid) return write_invalid(p, b);
  top_logprobs(r, p, b, lse);
  r.x = p.logits + b * p.logits_row_stride;
  if (has_penalties(p, b)) {
    apply_penalties(r, p, b);
    r.x = r.copy;
  }
  r.max = largest_lane(r);
  if (!(std::fabs(r.max) <= FLT_MAX)) return write_invalid(p, b);
  const long k = p.top_k[b];
  if (p.temperature[b] == 0.0f || k == 1) return write_token(p, b, arg_max(r), lse);
  // Kept away from 0 and infinity, whose products with the other are NaN.
  r.inverse_scale = std::fmin(std::fmax(kLog2E / p.temperature[b], FLT_MIN), FLT_MAX / 64);
  r.least_mass = fixed_point(p.min_p[b]);
  r.threshold = -INFINITY;
  r.dense = k == 0 || k >= r.vocab_size;
  if (r.dense) return;
  const long n = list_top_k(r, r.x, k);
  write_token(p, b, draw_from_list(r, n, p.top_p[b], random_bits(p, b)), lse);
}

void sample_dense(Row& r, const SampleParams& p, long b, double lse, const Crew& crew) {
  const Share chunks = share_of(r.num_chunks, crew.worker, crew.num_workers);
  const bool top_p = p.top_p[b] < 1.0f, min_p = p.min_p[b] > 0.0f;
  if (top_p) {
    for (long c = chunks.begin; c < chunks.end; ++c) histogram_chunk(r, c);
    crew.barrier();
    if (crew.worker == 0) find_bin(r, p.top_p[b]);
    crew.barrier();
    r.list_count[crew.worker] = chunks.begin < chunks.end ? collect_bin(r, chunks.begin, chunks.end) : 0;
    crew.barrier();
    if (crew.worker == 0) finish_bin(r, crew.num_workers);
  }
  if (!top_p || min_p) {
    crew.barrier();
    for (long c = chunks.begin; c < chunks.end; ++c) sum_chunk(r, c);
    crew.barrier();
  }
  if (crew.worker == 0) write_token(p, b, draw_dense(r, random_bits(p, b)), lse);
}

void sample_row(Row& r, const SampleParams& p, long b, const Crew& crew) {
  const float* raw = p.logits + b * p.logits_row_stride;
  const Share chunks = share_of(r.num_chunks, crew.worker, crew.num_workers);
  const bool want_sum = p.logprobs != nullptr || p.num_top_logprobs > 0;
  float* copy = has_penalties(p, b) ? r.copy : nullptr;
  for (long c = chunks.begin; c < chunks.end; ++c) chunk_statistics(r, raw, c, want_sum, copy);
  crew.barrier();
  double lse = 0.0;
  if (crew.worker == 0) {
    bool valid;
    lse = log_sum_exp(r, valid);
    decide(r, p, b, lse, valid);
  }
  crew.barrier();
  if (r.dense) sample_dense(r, p, b, lse, crew);
  crew.barrier();  // the next row uses the same memory
}

// The hash table's size: a power of two, at most half full.
long history_capacity(const SampleParams& p) {
  long longest = 0;
  for (long b = 0; p.repetition_penalty != nullptr && b < p.batch_size; ++b) {
    const long n = p.history_indptr[b + 1] - p.history_indptr[b];
    longest = n > longest ? n : longest;
  }
  long capacity = 16;
  while (capacity < 2 * longest) capacity *= 2;
  return capacity;
}

}  // namespace

void sample(const SampleParams& p) {
  const long work = p.batch_size * p.vocab_size / kMinLogitsPerWorker;
  const int wanted = work < 1 ? 1 : work < kMaxWorkers ? int(work) : kMaxWorkers;
  const int available = num_threads();
  const int max_workers = wanted < available ? wanted : available;
  const long capacity = history_capacity(p);
  Row shared;
  const size_t bytes = size_t(lay_out(shared, nullptr, p.vocab_size, capacity));
  lay_out(shared, static_cast<char*>(scratch(Scratch::kLaunch, bytes)), p.vocab_size, capacity);
  auto work_on_rows = [&](int worker, int num_workers) {
    const long left_over = p.batch_size % num_workers, alone = p.batch_size - left_over;
    if (alone > 0) {
      Row own;
      lay_out(own, static_cast<char*>(scratch(Scratch::kWorker, bytes)), p.vocab_size, capacity);
      for (long b = worker; b < alone; b += num_workers) sample_row(own, p, b, {0, 1});
    }
    for (long b = alone; b < p.batch_size; ++b) sample_row(shared, p, b, {worker, num_workers});
  };
  parallel_together(max_workers, work_on_rows);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
