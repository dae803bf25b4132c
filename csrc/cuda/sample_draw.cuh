// Part of sample.cu, and of shard_draw.cu (the search of a chunk): filters and the draw of one row, by one block
// of 1,024 threads.
//
// What they look at is either the row's list of candidates in shared memory, or, where that does not reach,
// the row itself in L2. All of them are searches for the key at which masses reach a sum (common/select.cuh).
#pragma once

#include "cuda/sample_scan.cuh"

namespace tilestream::cuda {
namespace {

constexpr int kMaxTop = 64;

struct DrawStorage {
  SelectStorage select;
  float sums[kSelectWarps];
  Key top[kMaxTop];
  int num_top;
  int num_list;
  int chunk;      // in which the draw falls
  float largest;  // logit in it
  Mass left;      // of the draw, from its start
  union {
    Key list[kMaxCandidates];
    Mass chunk_mass[kSelectThreads];  // a row has no more chunks
  };
};

// ---- what is selected from ------------------------------------------------------------------------

// Logits in memory: `num` of them from first_id on, 8 of each kEvery. A thread has 8 loads under way.
template <int kEvery>
struct SomeLogits {
  const float* x;
  int first_id, num;

  __device__ __forceinline__ int offset(int i) const { return kEvery == 8 ? i : i / 8 * kEvery + i % 8; }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    constexpr int kLoads = 8;
    for (int begin = threadIdx.x; begin < num; begin += kLoads * kSelectThreads) {
      float held[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = begin + j * kSelectThreads;
        held[j] = i < num ? x[offset(i)] : -INFINITY;
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = begin + j * kSelectThreads;
        if (i < num) f(key_of(held[j], first_id + offset(i)));
      }
    }
  }
};

using Logits = SomeLogits<8>;

struct Candidates {
  const Key* keys;
  int num;

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = threadIdx.x; i < num; i += kSelectThreads) f(keys[i]);
  }
};

// What one row's draw looks at.
struct Row {
  int64_t vocab_size;
  float max;
  float inverse_scale;
  uint64_t random;
  Mass total;  // of all logits; unknown under top-k

  __device__ __forceinline__ float weight(Key key) const {
    return weight_of(logit_of(key), max, inverse_scale);
  }
};

// Copies the row's lists into shared memory. Returns the bits from which on they hold every finite logit: 0
// is all of the row, all ones that they are of no use.
__device__ __forceinline__ unsigned load_list(DrawStorage& s, const Scratch& scratch, ListKind kind,
                                              int64_t b) {
  const int t = threadIdx.x, lane = t % kWarpSize;
  if (t == 0) s.num_list = 0;
  const Key bound = t < scratch.num_blocks ? scratch.lists[scratch.list(kind, b, t)].bound : 0;
  const unsigned lowest = unsigned(block_max(s.select, bound));
  for (int block = t / kWarpSize; block < scratch.num_blocks; block += kSelectWarps) {
    const int64_t list = scratch.list(kind, b, block);
    const int num = int(scratch.lists[list].num);
    int begin = lane == 0 ? atomicAdd(&s.num_list, num) : 0;
    begin = __shfl_sync(kFullMask, begin, 0);
    for (int i = lane; i < num; i += kWarpSize)
      s.list[begin + i] = scratch.candidates[list * scratch.capacity + i];
  }
  __syncthreads();
  return lowest;
}

// ---- filters --------------------------------------------------------------------------------------

// The key of the k-th largest finite logit from bits `lowest` on; false if there are fewer.
template <class Items>
__device__ __forceinline__ bool find_top_k(DrawStorage& s, const Items& items, int64_t vocab_size,
                                           unsigned lowest, unsigned highest, int k, Key& least) {
  const unsigned from = max(lowest, ordered_bits(-kFloatMax));
  const auto is_counted = [&](Key key) { return Mass(logit_bits_of(key) >= from); };
  const Threshold found = select(s.select, items, k, from, highest, logit_bits_of, is_counted);
  if (!found.reached) return false;
  least = Key(found.bits) << 32;
  if (found.mass == found.need) return true;
  const auto is_tied = [&](Key key) { return Mass(logit_bits_of(key) == found.bits); };
  least |= select(s.select, items, found.need, id_bits(vocab_size - 1), id_bits(0), id_bits_of, is_tied).bits;
  return true;
}

// The smallest mass that is at least the fraction top_p of `total`.
__device__ __forceinline__ Mass needed_mass(float top_p, Mass total) {
  const double need = ceil(double(top_p) * double(total));
  return need < 1.0 ? 1 : need < double(total) ? Mass(need) : total;
}

// Where the top-p threshold of a row probably lies, by a sixteenth of its logits, in bins of 1/32 octave of
// weight. The fraction there differs from the row's by less than the slack of 1/32 (of a flat row of 128,256
// it deviates by 0.6 %); where it does not, that costs time alone.
struct Range { unsigned lowest, highest; };

template <class MassOf>
__device__ __forceinline__ Range guess_top_p(DrawStorage& s, const Logits& logits, const Row& row,
                                             float top_p, MassOf mass_of) {
  constexpr float kBinsPerOctave = 32.0f;
  constexpr int kEvery = 128, kSlack = 32;
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.select.low[i] = s.select.high[i] = 0;
  __syncthreads();
  const SomeLogits<kEvery> some{logits.x, 0, logits.num / kEvery * 8};
  some.for_each([&](Key key) {
    const float bin = fminf((row.max - logit_of(key)) * row.inverse_scale * kBinsPerOctave, float(kBins - 1));
    const Mass mass = mass_of(key);
    if (mass != 0) add_to_bin(s.select, unsigned(kBins - 1 - int(bin)), mass);
  });
  __syncthreads();
  const Mass total = find_bin(s.select, 1), need = needed_mass(top_p, total), slack = total / kSlack;
  if (need <= slack || need + slack > total) return {0, ordered_bits(row.max)};
  const float width = 1.0f / (row.inverse_scale * kBinsPerOctave);
  find_bin(s.select, need - slack);
  const float high = row.max - float(kBins - 1 - s.select.found_bin) * width;
  find_bin(s.select, need + slack);
  const float low = row.max - float(kBins - s.select.found_bin) * width;
  return {ordered_bits(low), ordered_bits(high)};
}

template <class MassOf>
__device__ __forceinline__ Threshold find_top_p(DrawStorage& s, const Candidates& list, unsigned lowest,
                                                const Row& row, Mass need, float, MassOf mass_of) {
  return select(s.select, list, need, lowest, ordered_bits(row.max), logit_bits_of, mass_of);
}
template <class MassOf>
__device__ __forceinline__ Threshold find_top_p(DrawStorage& s, const Logits& logits, unsigned,
                                                const Row& row, Mass need, float top_p, MassOf mass_of) {
  const Range range = guess_top_p(s, logits, row, top_p, mass_of);
  const Threshold found = select(s.select, logits, need, range.lowest, range.highest, logit_bits_of, mass_of);
  if (found.reached) return found;
  return select(s.select, logits, need, 0, ordered_bits(row.max), logit_bits_of, mass_of);
}

// 64 random bits of Philox4x32-10 with key = seed, counter = position.
__device__ __forceinline__ uint64_t philox(uint64_t seed, uint64_t position) {
  unsigned c[4] = {unsigned(position), unsigned(position >> 32), 0, 0};
  unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned c0 = c[0], c2 = c[2];
    c[0] = __umulhi(0xCD9E8D57u, c2) ^ c[1] ^ k0;
    c[1] = 0xCD9E8D57u * c2;
    c[2] = __umulhi(0xD2511F53u, c0) ^ c[3] ^ k1;
    c[3] = 0xD2511F53u * c0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t(c[1]) << 32 | c[0];
}

// The id at which masses, summed in id order, reach `need`, which is from 1 to their sum.
template <class Items, class MassOf>
__device__ __forceinline__ int64_t find_id(DrawStorage& s, const Items& items, int first_id, int64_t last_id,
                                           Mass need, MassOf mass_of) {
  const unsigned lowest = id_bits(last_id), highest = id_bits(first_id);
  return id_of(select<true>(s.select, items, need, lowest, highest, id_bits_of, mass_of).bits);
}
template <class MassOf>
__device__ __forceinline__ int64_t find_id(DrawStorage& s, const Logits& logits, Mass need, MassOf mass_of) {
  return find_id(s, logits, logits.first_id, logits.first_id + logits.num - 1, need, mass_of);
}

// The chunk in which the draw falls, given the mass of this thread's, and what of the draw is left in it.
__device__ __forceinline__ void find_chunk(DrawStorage& s, Mass mass, const Scan& scan, Mass target) {
  if (scan.below <= target && target < scan.below + mass)
    s.chunk = int(threadIdx.x), s.left = target - scan.below;
  __syncthreads();
}

__device__ __forceinline__ Logits chunk_of(const float* x, int64_t vocab_size, int chunk) {
  const int first = chunk * kChunk;
  return {x + first, first, min(kChunk, int(vocab_size) - first)};
}

// The draw among a list: by radix select over all of it.
template <class MassOf>
__device__ __forceinline__ int64_t draw_kept(DrawStorage& s, const Candidates& list, const Row& row,
                                             MassOf mass_of) {
  Mass own = 0;
  list.for_each([&](Key key) { own += mass_of(key); });
  const Mass total = block_scan(s.select, own).total;
  return find_id(s, list, 0, row.vocab_size - 1, __umul64hi(row.random, total) + 1, mass_of);
}

// The draw among a row: a warp sums chunks, and only that in which the draw falls is searched.
template <class MassOf>
__device__ __forceinline__ int64_t draw_kept(DrawStorage& s, const Logits& logits, const Row& row,
                                             MassOf mass_of) {
  const int lane = threadIdx.x % kWarpSize, num_chunks = int(ceil_div(logits.num, kChunk));
  for (int chunk = threadIdx.x / kWarpSize; chunk < num_chunks; chunk += kSelectWarps) {
    const Logits part = chunk_of(logits.x, logits.num, chunk);
    Mass own = 0;
#pragma unroll 8
    for (int i = lane; i < part.num; i += kWarpSize) own += mass_of(key_of(part.x[i], part.first_id + i));
    own = warp_sum(own);
    if (lane == 0) s.chunk_mass[chunk] = own;
  }
  __syncthreads();
  const Mass mass = int(threadIdx.x) < num_chunks ? s.chunk_mass[threadIdx.x] : 0;
  const Scan scan = block_scan(s.select, mass);
  find_chunk(s, mass, scan, __umul64hi(row.random, scan.total));
  return find_id(s, chunk_of(logits.x, logits.num, s.chunk), s.left + 1, mass_of);
}

// The draw without filters. The records have the masses of chunks, each in a unit of its own: `scale` of the
// row's.
__device__ __forceinline__ int64_t draw_unfiltered(DrawStorage& s, const ChunkRecord& record, Mass mass,
                                                   const Scan& scan, float scale, const float* x,
                                                   const Row& row) {
  find_chunk(s, mass, scan, __umul64hi(row.random, scan.total));
  if (int(threadIdx.x) == s.chunk) {
    s.left = min(Mass(double(s.left) / double(scale)), record.mass - 1);
    s.largest = logit_of(record.best);
  }
  __syncthreads();
  const float largest = s.largest;
  return find_id(s, chunk_of(x, row.vocab_size, s.chunk), s.left + 1,
                 [&](Key key) { return fixed_point(weight_of(logit_of(key), largest, row.inverse_scale)); });
}

// Filters and draws among items that hold every logit from bits `lowest` on; -1 if it takes others to tell.
template <class Items>
__device__ __forceinline__ int64_t draw(DrawStorage& s, const Items& items, unsigned lowest, const Row& row,
                                        const Rule& rule) {
  const unsigned highest = ordered_bits(row.max);
  Key least = Key(lowest) << 32;
  float least_weight = 0.0f;
  const auto mass_of = [&](Key key) -> Mass {
    if (key < least) return 0;
    const float weight = row.weight(key);
    return weight < least_weight ? 0 : fixed_point(weight);
  };
  // Beyond the items there is nothing, or nothing that the filter keeps.
  bool enough = lowest == 0;
  if (rule.top_k > 0) enough |= find_top_k(s, items, row.vocab_size, lowest, highest, rule.top_k, least);
  if (rule.top_p < 1.0f) {
    if (rule.top_k > 0 && !enough) return -1;
    Mass total = row.total;
    if (rule.top_k > 0) {
      Mass own = 0;
      items.for_each([&](Key key) { own += mass_of(key); });
      total = block_scan(s.select, own).total;
    }
    // Ties at the end of the smallest set are all in it.
    const Mass need = needed_mass(rule.top_p, total);
    const Threshold found = find_top_p(s, items, lowest, row, need, rule.top_p, mass_of);
    if (found.reached) least = max(least, Key(found.bits) << 32);
    enough |= found.reached;
  }
  if (rule.min_p > 0.0f) enough |= row.weight(Key(lowest) << 32) < rule.min_p;
  if (!enough) return -1;
  least_weight = rule.min_p;
  return draw_kept(s, items, row, mass_of);
}

}  // namespace
}  // namespace tilestream::cuda
