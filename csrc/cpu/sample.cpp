// Sampling on the CPU: filters without sorting, a seeded draw, log-probabilities. Contract: sample.h.
//
// Work: rows go to workers; the rows left over (fewer than workers) are each cut into chunks for all of them, one launch
// for each pass. One pass over the logits gives the log-sum-exp and, for each block, the maxima of its 16 lanes. Then
//   greedy     the block that holds the maximum is searched;
//   top-k      the k-th largest maximum bounds the k-th largest logit from below, so that few blocks are read again; a
//              select on the float bits of what they hold gives the exact threshold;
//   whole row  (no top-k) one more pass gives the masses and the top-p threshold (sample_mass.h); the draw walks the
//              chunk in which it falls.
// Masses are fixed point, so their sums do not depend on the order, hence not on the number of threads; the log-sum-exp
// is summed per chunk and then in chunk order.
// Sources: Philox4x32-10, Salmon et al. 2011; top-p, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
// Reads the logits once or twice; bound by exp2 where weights or logprobs are wanted, else by memory.
#include "tilestream/sample.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/common/thread_pool.h"
#include "cpu/sample_mass.h"
#include "cpu/sample_row.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kMinLogitsPerWorker = 16384;  // about 5 us of work

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

void sample_row(Row& r, const SampleParams& p, long b) {
  r.x = p.logits + b * p.logits_row_stride;
  const bool want_sum = p.logprobs != nullptr || p.num_top_logprobs > 0;
  float* copy = has_penalties(p, b) ? r.copy : nullptr;
  for_chunks(r, [&](long c) { chunk_statistics(r, r.x, c, want_sum, copy); });
  bool valid;
  const double lse = log_sum_exp(r, valid);
  if (!valid) return write_invalid(p, b);
  top_logprobs(r, p, b, lse);
  if (copy != nullptr) {
    apply_penalties(r, p, b);
    r.x = copy;
  }
  r.max = largest_lane(r);
  if (!(std::fabs(r.max) <= FLT_MAX)) return write_invalid(p, b);
  const long k = p.top_k[b];
  if (p.temperature[b] == 0.0f || k == 1) return write_token(p, b, arg_max(r), lse);
  r.inverse_scale = inverse_scale_of(p.temperature[b]);
  r.threshold = -INFINITY;
  r.least_weight = 0.0f;
  const uint64_t bits = philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
  const bool whole_row = k == 0 || k >= r.vocab_size;
  const int64_t token = whole_row ? draw_from_row(r, p.top_p[b], p.min_p[b], bits)
                                  : draw_from_list(r, list_top_k(r, r.x, k), p.top_p[b], p.min_p[b], bits);
  write_token(p, b, token, lse);
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
  const int available = num_threads();
  const int num_workers = work < 1 ? 1 : work < available ? int(work) : available;
  const long alone = p.batch_size - p.batch_size % num_workers;  // rows that one worker does from end to end
  const long capacity = history_capacity(p);
  Row row;
  const size_t bytes = size_t(lay_out(row, nullptr, p.vocab_size, capacity, num_workers));
  auto work_on_rows = [&](int worker, int team_size) {
    Row own;
    lay_out(own, static_cast<char*>(scratch(Scratch::kWorker, bytes)), p.vocab_size, capacity, 1);
    for (long b = worker; b < alone; b += team_size) sample_row(own, p, b);
  };
  if (alone > 0) parallel(num_workers, work_on_rows);
  lay_out(row, static_cast<char*>(scratch(Scratch::kLaunch, bytes)), p.vocab_size, capacity, num_workers);
  for (long b = alone; b < p.batch_size; ++b) sample_row(row, p, b);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
