// Draws from parts of the vocabulary on the CPU. Contract: shard_draw.h; weights and masses are those of sample.cpp.
//
// Work: chunks of 1,024 logits of all rows, in equal shares for the workers. A histogram's first round weighs all logits; later
// ones compare them with the range that is left and weigh the few inside. The draw reads one chunk.
// Bound in the first round by the additions to bins, about one a nanosecond; in later ones by memory; the masses by exp2.
#include "tilestream/shard_draw.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/common/thread_pool.h"
#include "cpu/sample_weights.h"
#include "cpu/simd/vec.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr long kMinLogitsPerWorker = 16384;  // about 5 us of work
constexpr int kTables = 4;  // neighbours often share a bin: in tables of their own, they need not wait for each other's stores

// What the histograms of the rounds so far say of a row's top-p threshold: its leading bits.
struct Search {
  uint32_t prefix = 0;
  int known = 0;  // bits
};

Search search_of(const ShardDrawParams& p, long b) {
  Search s;
  uint64_t need = 0;
  for (long round = 0; round < p.num_rounds; ++round) {
    const uint64_t* masses = p.histograms + (round * p.num_top_p + b) * kHistogramBins;
    if (round == 0) {
      uint64_t total = 0;
      for (int bin = 0; bin < kHistogramBins; ++bin) total += masses[bin];
      need = needed_mass(p.top_p[b], total);
    }
    int bin = kHistogramBins - 1;
    while (bin > 0 && masses[bin] < need) need -= masses[bin--];
    s.prefix = s.prefix << kHistogramBits | uint32_t(bin);
    s.known += kHistogramBits;
  }
  return s;
}

bool draws(const ShardDrawParams& p, long b) { return std::fabs(p.maxima[b]) <= FLT_MAX; }

// The filter of all logits, whatever their bits or weight.
Filter open_filter(const ShardDrawParams& p, long b) {
  return {p.maxima[b], inverse_scale_of(p.temperature[b]), -INFINITY, 0.0f};
}

Filter filter_of(const ShardDrawParams& p, long b) {
  Filter f = open_filter(p, b);
  f.least_weight = p.min_p[b];
  if (b < p.num_top_p) f.threshold = from_ordered_bits(search_of(p, b).prefix);
  if (p.temperature[b] == 0.0f) f.threshold = f.max;
  return f;
}

// f(row, its logits from a chunk on, how many) for all of the first num_rows rows, by all workers.
template <class F>
void for_chunks(const ShardDrawParams& p, long num_rows, F&& f) {
  const long num_chunks = ceil_div(p.vocab_size, kMassChunk), work = num_rows * p.vocab_size / kMinLogitsPerWorker;
  auto body = [&](int worker, int num_workers) {
    const Share chunks = share_of(num_rows * num_chunks, worker, num_workers);
    for (long begin = chunks.begin, end; begin < chunks.end; begin = end) {
      const long b = begin / num_chunks, first = begin % num_chunks;
      end = (b + 1) * num_chunks < chunks.end ? (b + 1) * num_chunks : chunks.end;
      f(b, first, first + end - begin);
    }
  };
  if (work < 2) return body(0, 1);
  parallel(work < num_threads() ? int(work) : num_threads(), body);
}

// A chunk's logits, in `padded` with -inf behind them where the row ends in the middle of 16.
struct Chunk { const float* x; long num; };

Chunk chunk_of(const ShardDrawParams& p, long b, long chunk, float* padded) {
  const float* x = p.logits + b * p.logits_row_stride + chunk * kMassChunk;
  const long left = p.vocab_size - chunk * kMassChunk;
  if (left >= kMassChunk) return {x, kMassChunk};
  std::memcpy(padded, x, size_t(left) * sizeof(float));
  const long num = round_up(left, kLanes);
  for (long i = left; i < num; ++i) padded[i] = -INFINITY;
  return {padded, num};
}

// ---- histograms ---------------------------------------------------------------------------------

struct Range { float low, high; };  // low <= x < high

// Finite logits that begin with the bits of `s`. Bits that NaN has, and zero has not, are in no logit.
Range range_of(const Search& s) {
  if (s.known == 0) return {-FLT_MAX, INFINITY};
  const int shift = 32 - s.known;
  const uint64_t low = uint64_t(s.prefix) << shift, high = low + (uint64_t(1) << shift);
  return {low < ordered_bits(-FLT_MAX) ? -FLT_MAX : from_ordered_bits(uint32_t(low)),
          high > ordered_bits(FLT_MAX) ? INFINITY : from_ordered_bits(uint32_t(high))};
}

// Adds the masses of the logits in the range to the bins of the 8 bits from `shift` on.
void add_chunk(const Filter& f, Chunk c, Range range, int shift, uint64_t (*bins)[kHistogramBins]) {
  alignas(64) float inside[kMassChunk + kLanes], weight[kLanes];
  const F32x16 low = set1(range.low), high = set1(range.high);
  long num = 0;
  for (long i = 0; i < c.num; i += kLanes) {
    const F32x16 x = load(c.x + i);
    const uint32_t lanes = lanes_ge(x, low) & ~lanes_ge(x, high);
    if (lanes != 0) num += store_lanes(inside + num, x, lanes);
  }
  store(inside + num, set1(-INFINITY));  // weigh nothing
  for (long i = 0; i < num; i += kLanes) {
    store(weight, weights(f, load(inside + i)));
    for (long j = 0; j < kLanes; ++j) {
      bins[j % kTables][ordered_bits(inside[i + j]) >> shift & (kHistogramBins - 1)] += fixed_point(weight[j]);
    }
  }
}

}  // namespace

void shard_histogram(const ShardDrawParams& p) {
  const int shift = 32 - (p.num_rounds + 1) * kHistogramBits;
  for_chunks(p, p.num_top_p, [&](long b, long first, long last) {
    if (!draws(p, b)) return;
    const Filter f = open_filter(p, b);
    const Range range = range_of(search_of(p, b));
    alignas(64) uint64_t bins[kTables][kHistogramBins] = {};
    alignas(64) float padded[kMassChunk];
    for (long c = first; c < last; ++c) add_chunk(f, chunk_of(p, b, c, padded), range, shift, bins);
    for (int bin = 0; bin < kHistogramBins; ++bin) {
      uint64_t sum = 0;
      for (int table = 0; table < kTables; ++table) sum += bins[table][bin];
      if (sum != 0) __atomic_fetch_add(p.histogram + b * kHistogramBins + bin, sum, __ATOMIC_RELAXED);
    }
  });
}

void shard_masses(const ShardDrawParams& p) {
  const long num_chunks = ceil_div(p.vocab_size, kMassChunk);
  for_chunks(p, p.batch_size, [&](long b, long first, long last) {
    uint64_t* masses = p.chunk_masses + b * num_chunks;
    if (!draws(p, b)) {
      for (long c = first; c < last; ++c) masses[c] = 0;
      return;
    }
    const Filter f = filter_of(p, b);
    const F32x16 threshold = set1(f.threshold);
    alignas(64) float padded[kMassChunk];
    for (long c = first; c < last; ++c) {
      const Chunk chunk = chunk_of(p, b, c, padded);
      FixedSum sum = no_mass();
      for (long i = 0; i < chunk.num; i += kLanes) {
        const F32x16 x = load(chunk.x + i);
        if (lanes_ge(x, threshold) != 0) sum = add_mass(sum, kept_weights(f, x));
      }
      masses[c] = reduce_mass(sum);
    }
  });
}

void shard_draw(const ShardDrawParams& p) {
  const long num_chunks = ceil_div(p.vocab_size, kMassChunk);
  for (long b = 0; b < p.batch_size; ++b) {
    p.tokens[b] = -1;
    uint64_t below = 0, total = 0;
    for (int rank = 0; rank < p.world_size; ++rank) {
      const uint64_t mass = p.masses[rank * p.batch_size + b];
      below += rank < p.rank ? mass : 0;
      total += mass;
    }
    const uint64_t bits = p.temperature[b] == 0.0f ? 0 : philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
    const uint64_t target = scaled_draw(bits, total);
    if (!draws(p, b) || target < below || target - below >= p.masses[p.rank * p.batch_size + b]) continue;
    uint64_t left = target - below;
    const uint64_t* masses = p.chunk_masses + b * num_chunks;
    long c = 0;
    while (c < num_chunks - 1 && masses[c] <= left) left -= masses[c++];
    alignas(64) float padded[kMassChunk];
    uint64_t mass[kMassChunk];
    const Chunk chunk = chunk_of(p, b, c, padded);
    kept_masses(filter_of(p, b), chunk.x, chunk.num, mass);
    long i = 0;
    while (i < chunk.num - 1 && mass[i] <= left) left -= mass[i++];
    p.tokens[b] = p.first_id + c * kMassChunk + i;
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
