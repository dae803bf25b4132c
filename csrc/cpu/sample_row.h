// Part of sample.cpp: the working memory of one row, its workers, and selection among its logits without sorting.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/common/thread_pool.h"
#include "cpu/sample_weights.h"
#include "cpu/simd/vec.h"
#include "tilestream/types.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kBlock = 256;  // logits with one vector of lane maxima
constexpr long kChunk = 2048;  // unit of work, and of the fixed-order sums
constexpr long kSegment = kChunk + kLanes;  // a chunk's candidates, ended by -inf

struct HistoryEntry {
  int32_t token;  // -1: free
  int32_t output_count;
};

// Working memory of one row.
struct Row : Filter {
  float* copy;           // [vocab_size] penalised logits
  float* lane_max;       // [num_blocks][16] of the logits that are sampled
  float* chunk_max;      // [num_chunks] of the raw logits
  double* chunk_sum;     // [num_chunks] sum of exp(logit - chunk_max); NaN when the chunk has a NaN
  uint64_t* chunk_mass;  // [num_chunks] of what the draw keeps
  uint64_t* chunk_total;   // [num_chunks] of all logits
  uint64_t* chunk_inside;  // [num_chunks] of the listed logits
  float* list_x;         // candidates in id order; or [num_chunks][kSegment], those of each chunk
  int32_t* list_id;      // [num_chunks][kSegment], as are:
  uint64_t* list_mass;
  uint32_t* key;         // what select() selects from
  uint64_t* key_mass;
  long* list_count;      // [num_chunks]
  HistoryEntry* history;
  long history_capacity;

  long vocab_size, num_blocks, num_chunks;
  int num_workers;
  const float* x;  // logits that are sampled: raw or `copy`; Filter::max is theirs
};

// ---- memory -------------------------------------------------------------------------------------

template <class T>
T* take(char*& next, long num) {
  T* result = reinterpret_cast<T*>(next);
  next += round_up(num * long(sizeof(T)), 64);
  return result;
}

// Lays a row's arrays out from `base`; returns the bytes taken.
long lay_out(Row& r, char* base, long vocab_size, long capacity, int num_workers) {
  r.vocab_size = vocab_size;
  r.num_workers = num_workers;
  r.num_blocks = ceil_div(vocab_size, kBlock);
  r.num_chunks = ceil_div(vocab_size, kChunk);
  r.history_capacity = capacity;
  char* next = base;
  r.copy = take<float>(next, vocab_size);
  r.lane_max = take<float>(next, r.num_blocks * kLanes);
  r.chunk_max = take<float>(next, r.num_chunks);
  r.chunk_sum = take<double>(next, r.num_chunks);
  r.chunk_mass = take<uint64_t>(next, r.num_chunks);
  r.chunk_total = take<uint64_t>(next, r.num_chunks);
  r.chunk_inside = take<uint64_t>(next, r.num_chunks);
  r.list_x = take<float>(next, r.num_chunks * kSegment);
  r.list_id = take<int32_t>(next, r.num_chunks * kSegment);
  r.list_mass = take<uint64_t>(next, r.num_chunks * kSegment);
  r.key = take<uint32_t>(next, r.num_chunks * kSegment);
  r.key_mass = take<uint64_t>(next, r.num_chunks * kSegment);
  r.list_count = take<long>(next, r.num_chunks);
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

// f(chunk) for all chunks, by all workers of the row.
template <class F>
void for_chunks(const Row& r, F&& f) {
  auto body = [&](int worker, int num_workers) {
    const Share chunks = share_of(r.num_chunks, worker, num_workers);
    for (long c = chunks.begin; c < chunks.end; ++c) f(c);
  };
  if (r.num_workers == 1) return body(0, 1);
  parallel(r.num_workers, body);
}

// ---- selection without sorting ------------------------------------------------------------------

// Puts x[0 .. n) with masses (1 each when null) behind the first `num` keys; returns how many there are then.
long add_keys(Row& r, long num, const float* x, const uint64_t* mass, long n) {
  for (long i = 0; i < n; ++i) r.key[num + i] = ordered_bits(x[i]);
  for (long i = 0; i < n; ++i) r.key_mass[num + i] = mass == nullptr ? 1 : mass[i];
  return num + n;
}

// The largest x such that the masses of all keys >= x sum to at least `need`, which must be from 1 to the sum of all. Each
// round sorts the keys that are left into 256 equal ranges of float bits and keeps those of one range.
float select(Row& r, long num, uint64_t need) {
  while (true) {
    uint32_t low = ~0u, high = 0;
    for (long i = 0; i < num; ++i) {
      low = r.key[i] < low ? r.key[i] : low;
      high = r.key[i] > high ? r.key[i] : high;
    }
    if (low == high) return from_ordered_bits(low);
    const int bits = 32 - __builtin_clz(high - low), shift = bits > 8 ? bits - 8 : 0;
    uint64_t bins[256] = {};
    for (long i = 0; i < num; ++i) bins[(r.key[i] - low) >> shift] += r.key_mass[i];
    uint32_t bin = (high - low) >> shift;
    while (bins[bin] < need) need -= bins[bin--];
    long kept = 0;
    for (long i = 0; i < num; ++i) {  // no branch: it could not be predicted
      r.key[kept] = r.key[i];
      r.key_mass[kept] = r.key_mass[i];
      kept += (r.key[i] - low) >> shift == bin;
    }
    num = kept;
  }
}

// Lists, in id order, all x >= floor; returns how many.
long collect_at_least(Row& r, const float* x, float floor) {
  alignas(64) float padded[kBlock];
  const F32x16 least = set1(floor);
  long n = 0;
  for (long b = 0; b < r.num_blocks; ++b) {
    if (lanes_ge(load(r.lane_max + b * kLanes), least) == 0) continue;
    const float* p = block_of(r, x, b, padded);
    for (long i = 0; i < kBlock; i += kLanes) {
      for (uint32_t lanes = lanes_ge(load(p + i), least); lanes != 0; lanes &= lanes - 1) {
        const long j = i + __builtin_ctz(lanes);
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
    floor = select(r, add_keys(r, 0, r.list_x, nullptr, r.num_blocks), uint64_t(k));
  } else if (k <= r.num_blocks * kLanes) {
    floor = select(r, add_keys(r, 0, r.lane_max, nullptr, r.num_blocks * kLanes), uint64_t(k));
  }
  const long n = collect_at_least(r, x, floor > -FLT_MAX ? floor : -FLT_MAX);
  if (n <= k) return n;
  const float threshold = select(r, add_keys(r, 0, r.list_x, nullptr, n), uint64_t(k));
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
