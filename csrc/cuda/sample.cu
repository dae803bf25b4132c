// Sampling: filters without sorting, a seeded draw, log-probabilities. Contract: sample.h.
//
// One block takes one row, and reads it once for each of: the maximum, the log-sum-exp, every 11 bits of a
// threshold (top-k, top-p, top logprobs; two or three each), the draw. After the first pass a row stands in
// L2. Masses are fixed point and sums of them integers, so that answers do not depend on the order of
// threads. Sources: Philox4x32-10, Salmon et al. 2011; top-p, Holtzman et al. 2019; min-p, Nguyen et al.
// 2024. Bound by one SM's share of L2 bandwidth; a row by a cluster of blocks would be the next step.
#include "tilestream/sample.h"

#include "cuda/common/reduce.cuh"
#include "cuda/common/select.cuh"
#include "cuda/runtime.cuh"

namespace tilestream::cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kFloatMax = 3.402823466e38f, kFloatMin = 1.175494351e-38f;
constexpr float kFixedPoint = 17592186044416.0f;  // 2^44: a weight of 1; 2^20 of them fit
constexpr int kMaxTop = 64;

struct SharedStorage {
  SelectStorage select;
  float sums[kRowWarps];
  Key top[kMaxTop];
  int num_top;
};

// What one row's draw looks at.
struct Row {
  const float* x;
  int64_t num;
  float max;            // of x
  float inverse_scale;  // log2(e) / temperature
  Key least_key;        // the draw keeps logits from here on
  float least_weight;   // and of those, weights from here on (min-p)

  __device__ __forceinline__ Mass kept_mass(int64_t i) const {
    if (key_of(x[i], i) < least_key) return 0;
    const float weight = exp2f((x[i] - max) * inverse_scale);
    return weight < least_weight ? 0 : Mass(weight * kFixedPoint);
  }
};

// ---- statistics -----------------------------------------------------------------------------------

// The key of the largest logit; 0 if there is a NaN or an infinite largest one.
__device__ __forceinline__ Key largest_key(SharedStorage& s, const float* x, int64_t num) {
  Key best = 0;
  bool nan = false;
  for (int64_t i = threadIdx.x; i < num; i += kRowThreads) {
    nan |= x[i] != x[i];
    best = max(best, key_of(x[i], i));
  }
  nan = __syncthreads_or(nan);
  best = block_max(s.select, best);
  return nan || !(fabsf(logit_of(best)) <= kFloatMax) ? 0 : best;
}

__device__ __forceinline__ double log_sum_exp(SharedStorage& s, const float* x, int64_t num, float largest) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < num; i += kRowThreads) sum += expf(x[i] - largest);
  return double(largest) + log(double(block_sum(sum, s.sums)));
}

// The num_top_logprobs most likely tokens of the raw logits; -1 and -inf where there are fewer.
__device__ __forceinline__ void write_top_logprobs(SharedStorage& s, const SampleParams& p, int64_t b,
                                                   const float* x, double lse) {
  const int k = p.num_top_logprobs, t = threadIdx.x;
  if (k == 0) return;
  const auto key = [&](int64_t i) { return key_of(x[i], i); };
  const auto finite = [&](int64_t i) { return Mass(x[i] >= -kFloatMax); };
  if (t == 0) s.num_top = 0;
  const Key least = select_key(s.select, p.vocab_size, k, key, finite);
  for (int64_t i = t; i < p.vocab_size; i += kRowThreads) {
    if (finite(i) && key(i) >= least) s.top[atomicAdd(&s.num_top, 1)] = key(i);
  }
  __syncthreads();
  if (t >= k) return;
  int place = t;
  if (t < s.num_top) {
    place = 0;
    for (int j = 0; j < s.num_top; ++j) place += s.top[j] > s.top[t];
  }
  p.top_ids[b * k + place] = t < s.num_top ? id_of(s.top[t]) : -1;
  p.top_logprobs[b * k + place] = t < s.num_top ? float(double(logit_of(s.top[t])) - lse) : -INFINITY;
}

__device__ __forceinline__ void write_token(const SampleParams& p, int64_t b, int64_t token, double lse) {
  p.tokens[b] = token;
  if (p.logprobs == nullptr) return;
  p.logprobs[b] = token < 0 ? NAN : float(double(p.logits[b * p.logits_row_stride + token]) - lse);
}

__device__ __forceinline__ void write_invalid(const SampleParams& p, int64_t b) {
  if (threadIdx.x == 0) write_token(p, b, -1, 0.0);
  for (int i = threadIdx.x; i < p.num_top_logprobs; i += kRowThreads) {
    p.top_ids[b * p.num_top_logprobs + i] = -1;
    p.top_logprobs[b * p.num_top_logprobs + i] = NAN;
  }
}

// ---- penalties ------------------------------------------------------------------------------------

__device__ __forceinline__ bool has_penalties(const SampleParams& p, int64_t b) {
  return p.repetition_penalty != nullptr && p.history_indptr[b + 1] > p.history_indptr[b] &&
         (p.repetition_penalty[b] != 1.0f || p.presence_penalty[b] != 0.0f || p.frequency_penalty[b] != 0.0f);
}

// The row's penalised logits into `out`, which first counts each token: -1 where the history lacks it, else
// how often the output has it.
__device__ __forceinline__ void penalise(const SampleParams& p, int64_t b, const float* x, float* out) {
  const int32_t* tokens = p.history + p.history_indptr[b];
  const int num = p.history_indptr[b + 1] - p.history_indptr[b];
  for (int64_t i = threadIdx.x; i < p.vocab_size; i += kRowThreads) out[i] = -1.0f;
  __syncthreads();
  for (int i = threadIdx.x; i < num; i += kRowThreads) out[tokens[i]] = 0.0f;
  __syncthreads();
  for (int i = p.history_prompt_len[b] + threadIdx.x; i < num; i += kRowThreads) {
    atomicAdd(&out[tokens[i]], 1.0f);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.vocab_size; i += kRowThreads) {
    const float count = out[i];
    float v = x[i];
    if (count >= 0.0f) v = v > 0.0f ? v / p.repetition_penalty[b] : v * p.repetition_penalty[b];
    if (count > 0.0f) v -= p.presence_penalty[b] + p.frequency_penalty[b] * count;
    out[i] = v;
  }
  __syncthreads();
}

// ---- filters and the draw -------------------------------------------------------------------------

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

__device__ __forceinline__ void keep_top_k(SharedStorage& s, Row& row, int k) {
  const auto finite = [&](int64_t i) { return Mass(row.x[i] >= -kFloatMax); };
  row.least_key = select_key(s.select, row.num, k, [&](int64_t i) { return key_of(row.x[i], i); }, finite);
}

// Of what is kept, the smallest set with a mass of at least the fraction top_p; ties at its end are all in
// it.
__device__ __forceinline__ void keep_top_p(SharedStorage& s, Row& row, float top_p) {
  const auto mass = [&](int64_t i) { return row.kept_mass(i); };
  Mass own = 0;
  for (int64_t i = threadIdx.x; i < row.num; i += kRowThreads) own += mass(i);
  const Mass total = block_scan(s.select, own).total;
  const double fraction = ceil(double(top_p) * double(total));
  const Mass need = fraction < 1.0 ? 1 : fraction < double(total) ? Mass(fraction) : total;
  const auto key = [&](int64_t i) { return key_of(row.x[i], 0) & ~Key(0xffffffffu); };
  row.least_key = max(row.least_key, select_key(s.select, row.num, need, key, mass));
}

// The inverse CDF in id order. Each warp sums a stretch of the row; the one in which the draw falls walks it.
__device__ __forceinline__ void draw(SharedStorage& s, const SampleParams& p, int64_t b, const Row& row,
                                     double lse) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t stretch = round_up(ceil_div(row.num, kRowWarps), kWarpSize);
  const int64_t begin = warp * stretch, end = min(begin + stretch, row.num);
  Mass own = 0;
  for (int64_t i = begin + lane; i < end; i += kWarpSize) own += row.kept_mass(i);
  const Scan scan = block_scan(s.select, own);
  const Mass target = __umul64hi(philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b])), scan.total);
  Mass below = __shfl_sync(kFullMask, scan.below, 0);
  const Mass beyond = __shfl_sync(kFullMask, scan.below + own, kWarpSize - 1);
  if (target < below || target >= beyond) return;  // another warp's
  for (int64_t i = begin + lane;; i += kWarpSize) {
    const Mass reached = below + warp_scan(i < end ? row.kept_mass(i) : 0);
    const unsigned past = __ballot_sync(kFullMask, reached > target);
    if (past != 0) {
      if (lane == __ffs(int(past)) - 1) write_token(p, b, i, lse);
      return;
    }
    below = __shfl_sync(kFullMask, reached, kWarpSize - 1);
  }
}

__global__ void __launch_bounds__(kRowThreads)
sample_kernel(const __grid_constant__ SampleParams p) {
  auto& s = dynamic_smem<SharedStorage>();
  const int64_t b = blockIdx.x;
  const float* x = p.logits + b * p.logits_row_stride;
  Key best = largest_key(s, x, p.vocab_size);
  if (best == 0) return write_invalid(p, b);
  const bool want_logprobs = p.logprobs != nullptr || p.num_top_logprobs > 0;
  const double lse = want_logprobs ? log_sum_exp(s, x, p.vocab_size, logit_of(best)) : 0.0;
  write_top_logprobs(s, p, b, x, lse);
  if (has_penalties(p, b)) {
    float* const penalised = static_cast<float*>(p.workspace) + b * p.vocab_size;
    penalise(p, b, x, penalised);
    x = penalised;
    best = largest_key(s, x, p.vocab_size);
    if (best == 0) return write_invalid(p, b);
  }
  const int k = p.top_k[b];
  if (p.temperature[b] == 0.0f || k == 1) {
    if (threadIdx.x == 0) write_token(p, b, id_of(best), lse);
    return;
  }
  // Kept away from 0 and infinity, whose products with the other are NaN.
  const float inverse_scale = fminf(fmaxf(kLog2E / p.temperature[b], kFloatMin), kFloatMax / 64.0f);
  Row row{x, p.vocab_size, logit_of(best), inverse_scale, 0, 0.0f};
  if (k > 0 && k < p.vocab_size) keep_top_k(s, row, k);
  if (p.top_p[b] < 1.0f) keep_top_p(s, row, p.top_p[b]);
  row.least_weight = p.min_p[b];
  draw(s, p, b, row, lse);
}

}  // namespace

void sample(const SampleParams& p, Stream stream) {
  const unsigned grid = unsigned(p.batch_size);
  const LaunchConfig config{.grid = grid, .block = kRowThreads, .smem_bytes = sizeof(SharedStorage), .stream = stream};
  launch(sample_kernel, config, p);
}

}  // namespace tilestream::cuda
