// Part of sample.cu, and of shard_draw.cu (chunks, weights): the pass over the logits. Each is read once, into
// registers, and all that is said of a chunk of 1,024 comes from there: its maximum, its sums, its candidates
// for the filters.
//
// A warp takes a chunk, a lane 8 vectors of 4 of it; a block takes 8 chunks that are num_blocks apart, since
// likely tokens tend to be neighbours. At 64 registers 4 blocks share an SM: 128 KB of loads in flight.
#pragma once

#include "cuda/common/select.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/math.cuh"
#include "tilestream/sample.h"

namespace tilestream::cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kFloatMax = 3.402823466e38f, kFloatMin = 1.175494351e-38f;
constexpr int kMassBits = 44;  // a weight of 1 has mass 2^44: 2^20 of them fit
constexpr int kChunk = 1024, kChunkVecs = kChunk / kWarpSize / 4;
constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarpSize;
constexpr int kMaxCandidates = 4096;  // of a row

// ---- what the scan leaves for the draw ------------------------------------------------------------

struct ChunkRecord {
  Key raw_best, best;  // of the logits, and of the penalised ones; all ones: there is a NaN
  Mass mass;           // of its weights, that of its own maximum being 1
  float raw_sum;       // of exp(logit - maximum)
};

// A block's candidates: all of its finite logits whose bits are at least `bound`. All ones: they were too
// many.
struct ListRecord { unsigned bound, num; };

enum ListKind { kRaw, kSampled };

struct Scratch {
  ChunkRecord* chunks;  // [batch_size][num_chunks]
  ListRecord* lists;    // [2][batch_size][num_blocks]
  Key* candidates;      // [2][batch_size][num_blocks][capacity]
  float* penalised;     // [batch_size][row_stride]; null where no row has penalties
  int64_t batch_size, row_stride;
  int num_chunks, num_blocks, capacity;

  __device__ __forceinline__ int64_t list(ListKind kind, int64_t b, int block) const {
    return (kind * batch_size + b) * num_blocks + block;
  }
};

// ---- what a row asks for --------------------------------------------------------------------------

// Kept away from 0 and infinity, whose products with the other are NaN.
__device__ __forceinline__ float inverse_scale_of(float temperature) {
  return fminf(fmaxf(kLog2E / temperature, kFloatMin), kFloatMax / 64.0f);
}

struct Rule {
  int top_k;  // 0: off
  float top_p, min_p;
  float inverse_scale;  // log2(e) / temperature
  bool greedy, filtered, penalties;

  __device__ __forceinline__ Rule(const SampleParams& p, int64_t b) {
    const float temperature = p.temperature[b];
    const int k = p.top_k[b];
    top_k = k < p.vocab_size ? k : 0, top_p = p.top_p[b], min_p = p.min_p[b];
    greedy = temperature == 0.0f || k == 1;
    filtered = top_k > 0 || top_p < 1.0f || min_p > 0.0f;
    inverse_scale = inverse_scale_of(temperature);
    penalties =
        p.repetition_penalty != nullptr && p.history_indptr[b + 1] > p.history_indptr[b] &&
        (p.repetition_penalty[b] != 1.0f || p.presence_penalty[b] != 0.0f || p.frequency_penalty[b] != 0.0f);
  }
};

__device__ __forceinline__ bool wants_logprobs(const SampleParams& p) {
  return p.logprobs != nullptr || p.num_top_logprobs > 0;
}

// exp((x - max) / temperature), of x up to max.
__device__ __forceinline__ float weight_of(float x, float max, float inverse_scale) {
  return ptx::ex2_approx((x - max) * inverse_scale);
}

// floor(weight * 2^44), by two conversions to 32 bits: one to 64 is many times slower on sm_86 and sm_89.
__device__ __forceinline__ Mass fixed_point(float weight) {
  constexpr float kHalf = float(1 << kMassBits / 2);
  const unsigned high = unsigned(weight * kHalf);
  return Mass(high) * (1u << kMassBits / 2) + unsigned((weight * kHalf - float(high)) * kHalf);
}

// ---- one chunk in a warp's registers --------------------------------------------------------------

struct Chunk {
  float at[kChunkVecs][4];
  int first_id;  // of this lane: vectors are kVecStride apart
};
constexpr int kVecStride = kWarpSize * 4;

// Past the row's end all is -inf. A whole chunk is loaded without a branch, so that all of its loads are
// under way before the first is waited for.
template <bool kAligned>
__device__ __forceinline__ void load_chunk(Chunk& c, const float* x, int chunk, int vocab_size) {
  x += c.first_id;
  if ((chunk + 1) * kChunk <= vocab_size) {
#pragma unroll
    for (int v = 0; v < kChunkVecs; ++v) {
      const Vec<float> vec = load_vec<kAligned>(x + v * kVecStride, 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) c.at[v][k] = vec.at[k];
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < kChunkVecs; ++v) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = v * kVecStride + k;
      c.at[v][k] = c.first_id + i < vocab_size ? x[i] : -INFINITY;
    }
  }
}

// f(logit, how far its id is from the lane's first) for all of a lane.
template <class F>
__device__ __forceinline__ void for_each(const Chunk& c, F f) {
#pragma unroll
  for (int v = 0; v < kChunkVecs; ++v) {
#pragma unroll
    for (int k = 0; k < 4; ++k) f(c.at[v][k], v * kVecStride + k);
  }
}

__device__ __forceinline__ float lane_max(const Chunk& c) {
  float most = -INFINITY;
  for_each(c, [&](float x, int) { most = fmaxf(most, x); });
  return most;
}

// The key of the chunk's largest logit; all ones if it has a NaN.
__device__ __forceinline__ Key best_of(const Chunk& c) {
  const unsigned bits = __reduce_max_sync(kFullMask, ordered_bits(lane_max(c)));
  const float most = from_ordered_bits(bits);
  int offset = kChunk;  // of the lowest id among the largest
  bool nan = false;
  for_each(c, [&](float x, int i) {
    nan |= x != x;
    offset = x == most ? min(offset, i) : offset;
  });
  const unsigned lowest_id = __reduce_min_sync(kFullMask, unsigned(c.first_id + offset));
  return __any_sync(kFullMask, nan) ? ~Key(0) : Key(bits) << 32 | id_bits(lowest_id);
}

__device__ __forceinline__ Mass mass_of(const Chunk& c, float most, float inverse_scale) {
  Mass sum = 0;
  most = fmaxf(most, -kFloatMax);  // a chunk of -inf weighs nothing
  for_each(c, [&](float x, int) { sum += fixed_point(weight_of(x, most, inverse_scale)); });
  return warp_sum(sum);
}

__device__ __forceinline__ float exp_sum_of(const Chunk& c, float most) {
  float sum = 0.0f;
  most = fmaxf(most, -kFloatMax);
  for_each(c, [&](float x, int) { sum += expf(x - most); });
  return warp_sum(sum);
}

// ---- one block ------------------------------------------------------------------------------------

template <bool kPenalties>
struct ScanStorage {
  unsigned num_candidates;
  unsigned seen[kPenalties ? kScanWarps * kChunk : 1];  // per logit: bit 31, and how often the output has it
};

// Lists the block's logits from a bound on that at least `num` of them reach. It is found among the lanes'
// maxima, so that it costs no second look at the logits.
template <bool kPenalties>
__device__ __forceinline__ void list_largest(ScanStorage<kPenalties>& s, const Chunk& c, int num,
                                             const Scratch& scratch, int64_t list) {
  const unsigned bits_of_nothing = ordered_bits(-INFINITY), most = ordered_bits(lane_max(c));
  if (threadIdx.x == 0) s.num_candidates = 0;
  unsigned bound = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned trial = bound | 1u << bit;
    const int reached = __syncthreads_count(most >= trial);
    if (reached >= num) bound = trial;
    if (reached >= num && reached <= num + num / 8) break;
  }
  if (bound <= bits_of_nothing) bound = 0;
  const float least = bound == 0 ? -kFloatMax : from_ordered_bits(bound);
  unsigned own = 0;
  for_each(c, [&](float x, int) { own += x >= least; });
  Key* const out = scratch.candidates + list * scratch.capacity;
  const unsigned capacity = unsigned(scratch.capacity);
  if (own > 0) {
    unsigned place = atomicAdd(&s.num_candidates, own);
    for_each(c, [&](float x, int i) {
      if (!(x >= least)) return;
      if (place < capacity) out[place] = key_of(x, c.first_id + i);
      ++place;
    });
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned total = s.num_candidates;
    scratch.lists[list] = {total > capacity ? 0xffffffffu : bound, min(total, capacity)};
  }
  __syncthreads();
}

// Repetition over the whole history, then presence and frequency over the output; kept for later passes too.
__device__ __forceinline__ void penalise(ScanStorage<true>& s, Chunk& c, const SampleParams& p, int64_t b,
                                         const Scratch& scratch, int block) {
  const int32_t* tokens = p.history + p.history_indptr[b];
  const int num = p.history_indptr[b + 1] - p.history_indptr[b], num_prompt = p.history_prompt_len[b];
  for (int i = threadIdx.x; i < kScanWarps * kChunk; i += kScanThreads) s.seen[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num; i += kScanThreads) {
    const int chunk = tokens[i] / kChunk;
    if (chunk % scratch.num_blocks != block) continue;
    unsigned* const seen = &s.seen[chunk / scratch.num_blocks * kChunk + tokens[i] % kChunk];
    atomicOr(seen, 0x80000000u);
    if (i >= num_prompt) atomicAdd(seen, 1u);
  }
  __syncthreads();
  const unsigned* const seen = s.seen + threadIdx.x / kWarpSize * kChunk + threadIdx.x % kWarpSize * 4;
  float* const out = scratch.penalised + b * scratch.row_stride;
#pragma unroll
  for (int v = 0; v < kChunkVecs; ++v) {
    Vec<float> vec;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned times = seen[v * kVecStride + k];
      float x = c.at[v][k];
      if (times != 0) x = x > 0.0f ? x / p.repetition_penalty[b] : x * p.repetition_penalty[b];
      if (times << 1 != 0) x -= p.presence_penalty[b] + p.frequency_penalty[b] * float(times & 0x7fffffffu);
      vec.at[k] = c.at[v][k] = x;
    }
    const int id = c.first_id + v * kVecStride;
    store_vec<true>(out + id, vec, p.vocab_size - id);
  }
}

template <bool kAligned, bool kPenalties>
__global__ void __launch_bounds__(kScanThreads, kPenalties ? 3 : 4)
scan_kernel(const __grid_constant__ SampleParams p, const __grid_constant__ Scratch scratch) {
  auto& s = dynamic_smem<ScanStorage<kPenalties>>();
  const int64_t b = blockIdx.x / scratch.num_blocks;
  const int block = int(blockIdx.x % scratch.num_blocks), warp = threadIdx.x / kWarpSize;
  const int chunk = warp * scratch.num_blocks + block;
  Chunk c;
  c.first_id = chunk * kChunk + threadIdx.x % kWarpSize * 4;
  load_chunk<kAligned>(c, p.logits + b * p.logits_row_stride, chunk, int(p.vocab_size));
  const Rule rule(p, b);

  const bool writes = chunk < scratch.num_chunks && threadIdx.x % kWarpSize == 0;
  ChunkRecord* const record = scratch.chunks + b * scratch.num_chunks + chunk;
  Key best = best_of(c);
  const float raw_sum = wants_logprobs(p) ? exp_sum_of(c, logit_of(best)) : 0.0f;
  if (writes) record->raw_best = best, record->raw_sum = raw_sum;
  if (p.num_top_logprobs > 0) list_largest(s, c, p.num_top_logprobs, scratch, scratch.list(kRaw, b, block));
  if constexpr (kPenalties) {
    if (rule.penalties) {
      penalise(s, c, p, b, scratch, block);
      best = best_of(c);
    }
  }
  const Mass mass = rule.greedy || rule.top_k > 0 ? 0 : mass_of(c, logit_of(best), rule.inverse_scale);
  if (writes) record->best = best, record->mass = mass;
  if (rule.greedy || !rule.filtered) return;
  const int most = scratch.capacity / 2;
  list_largest(s, c, rule.top_k > 0 ? min(rule.top_k, most) : most, scratch,
               scratch.list(kSampled, b, block));
}

}  // namespace
}  // namespace tilestream::cuda
