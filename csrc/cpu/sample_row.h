// Part of sample.cpp: the working memory of one row, and selection among its logits without sorting.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/simd/vec.h"
#include "tilestream/types.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kBlock = 256;    // logits with one vector of lane maxima
constexpr long kChunk = 2048;   // unit of work, and of the fixed-order sums
constexpr long kLanes = 16;
constexpr int kBins = 512;      // of a chunk's mass histogram
constexpr float kBinsPerOctave = 11.5f;  // the last bin begins 44.5 octaves down, where masses vanish
constexpr int kMaxWorkers = 256;

struct HistoryEntry {
  int32_t token;  // -1: free
  int32_t output_count;
};

// Working memory of one row, shared by the workers that run it.
struct Row {
  float* copy;           // [vocab_size] penalised logits
  float* lane_max;       // [num_blocks][16] of the logits that are sampled
  float* chunk_max;      // [num_chunks] of the raw logits
  double* chunk_sum;     // [num_chunks] sum of exp(logit - chunk_max); NaN when the chunk has a NaN
  uint64_t* chunk_mass;  // [num_chunks]
  uint64_t* histogram;   // [num_chunks][kBins] mass by octaves below the maximum
  float* list_x;         // [vocab_size + 16] candidates in id order
  int32_t* list_id;
  uint64_t* list_mass;
  HistoryEntry* history;
  long history_capacity;
  long list_count[kMaxWorkers];

  long vocab_size, num_blocks, num_chunks;
  const float* x;       // logits that are sampled: raw or `copy`
  float max;            // of x
  float inverse_scale;  // log2(e) / temperature
  int64_t least_mass;   // min-p, in fixed point
  float threshold;      // smallest logit that top-p keeps
  int bin;              // the one that holds the threshold
  uint64_t bin_need;    // mass that top-p needs from it
  bool dense;           // the draw is still to be made, by all workers
};

// ---- memory -------------------------------------------------------------------------------------

template <class T>
T* take(char*& next, long num) {
  T* result = reinterpret_cast<T*>(next);
  next += round_up(num * long(sizeof(T)), 64);
  return result;
}

// Lays a row's arrays out from `base`; returns the bytes taken.
long lay_out(Row& r, char* base, long vocab_size, long capacity) {
  r.vocab_size = vocab_size;
  r.num_blocks = ceil_div(vocab_size, kBlock);
  r.num_chunks = ceil_div(vocab_size, kChunk);
  r.history_capacity = capacity;
  char* next = base;
  r.copy = take<float>(next, vocab_size);
  r.lane_max = take<float>(next, r.num_blocks * kLanes);
  r.chunk_max = take<float>(next, r.num_chunks);
  r.chunk_sum = take<double>(next, r.num_chunks);
  r.chunk_mass = take<uint64_t>(next, r.num_chunks);
  r.histogram = take<uint64_t>(next, r.num_chunks * kBins);
  r.list_x = take<float>(next, vocab_size + kLanes);
  r.list_id = take<int32_t>(next, vocab_size + kLanes);
  r.list_mass = take<uint64_t>(next, vocab_size);
  r.history = take<HistoryEntry>(next, capacity);
  return next - base;
}

// The logits of a block; a copy padded with -inf when the row ends inside it.
const float* block_of(const Row& r, const float* x, long block, float* padded) {
  const long begin = block * kBlock, num = r.vocab_size - begin;
  if (num >= kBlock) return x + begin;
  for (long i = 0; i < kBlock; ++i) padded[i] = i < num ? x[begin + i] : -INFINITY;
  return padded;
}

long block_end(const Row& r, long chunk) {
  const long end = (chunk + 1) * (kChunk / kBlock);
  return end < r.num_blocks ? end : r.num_blocks;
}

// ---- selection on a list ------------------------------------------------------------------------

// Order-preserving bits; -0 and +0 are one value.
inline uint32_t ordered_bits(float x) {
  const float y = x + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The largest x such that the weights (1 each when null) of all elements >= x sum to at least `need`; 8 bits
// at a time from the top. The sum over all elements must be at least `need`, and `need` at least 1.
float weighted_threshold(const float* x, const uint64_t* weight, long n, uint64_t need) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t bins[256] = {};
    for (long i = 0; i < n; ++i) {
      const uint32_t key = ordered_bits(x[i]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      bins[key >> shift & 255] += weight == nullptr ? 1 : weight[i];
    }
    int bin = 255;
    while (bin > 0 && bins[bin] < need) need -= bins[bin--];
    prefix = prefix << 8 | uint32_t(bin);
  }
  const uint32_t bits = prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu);
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Lists, in id order, all x >= floor; returns how many.
long collect_at_least(Row& r, const float* x, float floor) {
  alignas(64) float padded[kBlock];
  long n = 0;
  for (long b = 0; b < r.num_blocks; ++b) {
    if (!(reduce_max(load(r.lane_max + b * kLanes)) >= floor)) continue;
    const float* p = block_of(r, x, b, padded);
    for (long i = 0; i < kBlock; i += kLanes) {
      if (!(reduce_max(load(p + i)) >= floor)) continue;
      for (long j = i; j < i + kLanes; ++j) {
        if (!(p[j] >= floor)) continue;
        r.list_x[n] = p[j];
        r.list_id[n++] = int32_t(b * kBlock + j);
      }
    }
  }
  return n;
}

// Lists the k largest x in id order (ties: lowest ids; -inf never); returns how many.
long list_top_k(Row& r, const float* x, long k) {
  float floor = -FLT_MAX;
  if (k <= r.num_blocks) {
    for (long b = 0; b < r.num_blocks; ++b) r.list_x[b] = reduce_max(load(r.lane_max + b * kLanes));
    floor = weighted_threshold(r.list_x, nullptr, r.num_blocks, uint64_t(k));
  } else if (k <= r.num_blocks * kLanes) {
    floor = weighted_threshold(r.lane_max, nullptr, r.num_blocks * kLanes, uint64_t(k));
  }
  const long n = collect_at_least(r, x, floor > -FLT_MAX ? floor : -FLT_MAX);
  if (n <= k) return n;
  const float threshold = weighted_threshold(r.list_x, nullptr, n, uint64_t(k));
  long ties = k;
  for (long i = 0; i < n; ++i) ties -= r.list_x[i] > threshold;
  long kept = 0;
  for (long i = 0; i < n; ++i) {
    if (r.list_x[i] < threshold || (r.list_x[i] == threshold && ties-- <= 0)) continue;
    r.list_x[kept] = r.list_x[i];
    r.list_id[kept++] = r.list_id[i];
  }
  return kept;
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
