// Sampling: filters without sorting, a seeded draw, log-probabilities. Contract: sample.h.
//
// Two launches, and no block waits for another. The scan (sample_scan.cuh) reads the logits, spread over all SMs,
// and leaves of each row a record per 1,024 logits and a list of its largest. The draw takes a row to a block, and
// seldom looks at a logit again:
//   greedy         the records' maximum;
//   no filter      the records give the chunk in which the draw falls;
//   top-k, top-p,  are searched for in the list, which holds all logits from some bound on. Where that does not
//   min-p          reach (a flat distribution, many ties) the row is read from L2, by this one block: slow, same result.
// Masses are fixed point and sums of them integers, so that answers do not depend on the order of threads, and the
// draw finds what sums reach by a radix select: ids too, for the inverse CDF. 52 KB of shared memory.
//
// Estimate at 32 x 128,256 on an H200: scan 4.7 us (16.4 MB at 4.2 TB/s and 0.8 us to fill and drain, the rest of
// its work in their shadow), launch of the draw 1 us, its records and list 1 us, each of 4 to 6 passes 0.4 us.
// Bound by memory in the scan, by latency in the draw.
// Sources: Philox4x32-10, Salmon et al. 2011; top-p, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
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
  int chunk;  // in which the draw falls, and how far into it
  Mass need;
  Key list[kMaxCandidates];
};

// ---- what is selected from ------------------------------------------------------------------------

struct Logits {
  const float* x;
  int64_t first_id, num;
  __device__ __forceinline__ Key key(int64_t i) const { return key_of(x[i], first_id + i); }
};

struct Candidates {
  const Key* keys;
  int64_t num;
  __device__ __forceinline__ Key key(int64_t i) const { return keys[i]; }
};

// What one row's draw looks at.
struct Row {
  int64_t vocab_size;
  float max;
  float inverse_scale;
  Mass total;  // of all logits; unknown under top-k

  __device__ __forceinline__ float weight(Key key) const { return weight_of(logit_of(key), max, inverse_scale); }
};

// Copies the row's lists into shared memory. Returns the bits from which on they hold every finite logit: 0 is all
// of the row, all ones that they are of no use.
__device__ __forceinline__ unsigned load_list(DrawStorage& s, const Scratch& scratch, ListKind kind, int64_t b) {
  const int t = threadIdx.x, lane = t % kWarpSize;
  if (t == 0) s.num_list = 0;
  const Key bound = t < scratch.num_blocks ? scratch.lists[scratch.list(kind, b, t)].bound : 0;
  const unsigned lowest = unsigned(block_max(s.select, bound));
  for (int block = t / kWarpSize; block < scratch.num_blocks; block += kSelectWarps) {
    const int64_t list = scratch.list(kind, b, block);
    const int num = int(scratch.lists[list].num);
    int begin = lane == 0 ? atomicAdd(&s.num_list, num) : 0;
    begin = __shfl_sync(kFullMask, begin, 0);
    for (int i = lane; i < num; i += kWarpSize) s.list[begin + i] = scratch.candidates[list * scratch.capacity + i];
  }
  __syncthreads();
  return lowest;
}

// ---- filters --------------------------------------------------------------------------------------

// The key of the k-th largest finite logit from bits `lowest` on; false if there are fewer.
template <class Items>
__device__ __forceinline__ bool find_top_k(DrawStorage& s, const Items& items, int64_t vocab_size, unsigned lowest,
                                           unsigned highest, int k, Key& least) {
  const unsigned from = max(lowest, ordered_bits(-kFloatMax));
  const auto bits = [&](int64_t i) { return logit_bits_of(items.key(i)); };
  const Threshold found = select(s.select, items.num, k, from, highest, bits, [&](int64_t i) { return Mass(bits(i) >= from); });
  if (!found.reached) return false;
  least = Key(found.key) << 32;
  if (found.mass == found.need) return true;
  const auto tied = [&](int64_t i) { return Mass(bits(i) == found.key); };
  const auto id = [&](int64_t i) { return unsigned(items.key(i)); };
  least |= select(s.select, items.num, found.need, unsigned(key_of(0.0f, vocab_size - 1)), 0xffffffffu, id, tied).key;
  return true;
}

// The smallest mass that is at least the fraction top_p of `total`.
__device__ __forceinline__ Mass needed_mass(float top_p, Mass total) {
  const double need = ceil(double(top_p) * double(total));
  return need < 1.0 ? 1 : need < double(total) ? Mass(need) : total;
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
template <class Items, class MassAt>
__device__ __forceinline__ int64_t find_id(DrawStorage& s, const Items& items, int64_t vocab_size, Mass need, MassAt mass) {
  const auto id = [&](int64_t i) { return unsigned(items.key(i)); };
  const unsigned last = unsigned(key_of(0.0f, vocab_size - 1));
  return id_of(select<true>(s.select, items.num, need, last, 0xffffffffu, id, mass).key);
}

// Filters and draws among items that hold every logit from bits `lowest` on; -1 if it takes others to tell.
template <class Items>
__device__ __forceinline__ int64_t draw(DrawStorage& s, const Items& items, unsigned lowest, const Row& row,
                                        const Rule& rule, uint64_t random) {
  const unsigned highest = ordered_bits(row.max);
  Key least = Key(lowest) << 32;
  float least_weight = 0.0f;
  const auto mass = [&](int64_t i) -> Mass {
    const Key key = items.key(i);
    if (key < least) return 0;
    const float weight = row.weight(key);
    return weight < least_weight ? 0 : fixed_point(weight);
  };
  const auto sum = [&] {
    Mass own = 0;
    for (int64_t i = threadIdx.x; i < items.num; i += kSelectThreads) own += mass(i);
    return block_scan(s.select, own).total;
  };
  // Beyond the items there is nothing, or nothing that the filter keeps.
  bool enough = lowest == 0;
  if (rule.top_k > 0) enough |= find_top_k(s, items, row.vocab_size, lowest, highest, rule.top_k, least);
  if (rule.top_p < 1.0f) {
    if (rule.top_k > 0 && !enough) return -1;
    // Ties at the end of the smallest set are all in it.
    const Mass need = needed_mass(rule.top_p, rule.top_k > 0 ? sum() : row.total);
    const auto bits = [&](int64_t i) { return logit_bits_of(items.key(i)); };
    const Threshold found = select(s.select, items.num, need, lowest, highest, bits, mass);
    if (found.reached) least = max(least, Key(found.key) << 32);
    enough |= found.reached;
  }
  if (rule.min_p > 0.0f) enough |= row.weight(Key(lowest) << 32) < rule.min_p;
  if (!enough) return -1;
  least_weight = rule.min_p;
  return find_id(s, items, row.vocab_size, __umul64hi(random, sum()) + 1, mass);
}

// Without filters: `mass` is that of this thread's chunk, in the row's units, `scale` its unit.
__device__ __forceinline__ int64_t draw_unfiltered(DrawStorage& s, const ChunkRecord& record, Mass mass, Scan scan, float scale,
                                                   const float* x, const Row& row, uint64_t random) {
  const Mass target = __umul64hi(random, scan.total);
  if (scan.below <= target && target < scan.below + mass) {
    s.chunk = int(threadIdx.x);
    s.need = min(Mass(double(target - scan.below) / double(scale)) + 1, record.mass);
    s.top[0] = record.best;
  }
  __syncthreads();
  const int64_t first = int64_t(s.chunk) * kChunk;
  const Logits logits{x + first, first, min(int64_t(kChunk), row.vocab_size - first)};
  const float most = logit_of(s.top[0]);
  return find_id(s, logits, row.vocab_size, s.need,
                 [&](int64_t i) { return fixed_point(weight_of(logits.x[i], most, row.inverse_scale)); });
}

// ---- results --------------------------------------------------------------------------------------

__device__ __forceinline__ void write_token(const SampleParams& p, int64_t b, int64_t token, double lse) {
  if (threadIdx.x != 0) return;
  p.tokens[b] = token;
  if (p.logprobs == nullptr) return;
  p.logprobs[b] = token < 0 ? NAN : float(double(p.logits[b * p.logits_row_stride + token]) - lse);
}

__device__ __forceinline__ void write_invalid(const SampleParams& p, int64_t b) {
  write_token(p, b, -1, 0.0);
  for (int i = threadIdx.x; i < p.num_top_logprobs; i += kSelectThreads) {
    p.top_ids[b * p.num_top_logprobs + i] = -1;
    p.top_logprobs[b * p.num_top_logprobs + i] = NAN;
  }
}

// The num_top_logprobs largest of `items`, from `least` on; -1 and -inf where there are fewer.
template <class Items>
__device__ __forceinline__ void write_top(DrawStorage& s, const SampleParams& p, int64_t b, const Items& items, Key least, double lse) {
  const int k = p.num_top_logprobs, t = threadIdx.x;
  if (t == 0) s.num_top = 0;
  __syncthreads();
  for (int64_t i = t; i < items.num; i += kSelectThreads) {
    const Key key = items.key(i);
    if (key >= least && logit_of(key) >= -kFloatMax) s.top[atomicAdd(&s.num_top, 1)] = key;
  }
  __syncthreads();
  if (t < k) {
    int place = t;
    if (t < s.num_top) {
      place = 0;
      for (int j = 0; j < s.num_top; ++j) place += s.top[j] > s.top[t];
    }
    p.top_ids[b * k + place] = t < s.num_top ? id_of(s.top[t]) : -1;
    p.top_logprobs[b * k + place] = t < s.num_top ? float(double(logit_of(s.top[t])) - lse) : -INFINITY;
  }
  __syncthreads();
}

__device__ __forceinline__ void write_top_logprobs(DrawStorage& s, const SampleParams& p, const Scratch& scratch, int64_t b,
                                                   unsigned highest, double lse) {
  const unsigned lowest = load_list(s, scratch, kRaw, b);
  const Candidates list{s.list, s.num_list};
  Key least = 0;
  if (lowest != 0xffffffffu && (find_top_k(s, list, p.vocab_size, lowest, highest, p.num_top_logprobs, least) || lowest == 0))
    return write_top(s, p, b, list, least, lse);
  const Logits logits{p.logits + b * p.logits_row_stride, 0, p.vocab_size};
  find_top_k(s, logits, p.vocab_size, 0, highest, p.num_top_logprobs, least);
  write_top(s, p, b, logits, least, lse);
}

__device__ __forceinline__ bool is_valid(Key best) { return fabsf(logit_of(best)) <= kFloatMax; }

__global__ void __launch_bounds__(kSelectThreads)
draw_kernel(const __grid_constant__ SampleParams p, const __grid_constant__ Scratch scratch) {
  auto& s = dynamic_smem<DrawStorage>();
  const int64_t b = blockIdx.x;
  const Rule rule(p, b);
  ChunkRecord record{};  // of this thread's chunk: a row has no more of them than threads
  if (int(threadIdx.x) < scratch.num_chunks) record = scratch.chunks[b * scratch.num_chunks + threadIdx.x];
  const Key raw_best = block_max(s.select, record.raw_best);
  if (!is_valid(raw_best)) return write_invalid(p, b);
  double lse = 0.0;
  if (wants_logprobs(p)) {
    const float raw_most = logit_of(raw_best);
    const float own = record.raw_sum == 0.0f ? 0.0f : record.raw_sum * expf(logit_of(record.raw_best) - raw_most);
    lse = double(raw_most) + log(double(block_sum(own, s.sums)));
  }
  if (p.num_top_logprobs > 0) write_top_logprobs(s, p, scratch, b, logit_bits_of(raw_best), lse);
  const Key best = rule.penalties ? block_max(s.select, record.best) : raw_best;
  if (!is_valid(best)) return write_invalid(p, b);
  if (rule.greedy) return write_token(p, b, id_of(best), lse);

  Row row{p.vocab_size, logit_of(best), rule.inverse_scale, 0};
  const float* x = rule.penalties ? scratch.penalised + b * scratch.row_stride : p.logits + b * p.logits_row_stride;
  const uint64_t random = philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
  const float scale = record.mass == 0 ? 0.0f : row.weight(record.best);
  const Mass mass = Mass(double(record.mass) * double(scale));
  const Scan scan = block_scan(s.select, mass);
  row.total = scan.total;
  if (!rule.filtered) return write_token(p, b, draw_unfiltered(s, record, mass, scan, scale, x, row, random), lse);

  const unsigned lowest = load_list(s, scratch, kSampled, b);
  int64_t token = -1;
  if (lowest != 0xffffffffu) token = draw(s, Candidates{s.list, s.num_list}, lowest, row, rule, random);
  if (token < 0) token = draw(s, Logits{x, 0, p.vocab_size}, 0, row, rule, random);
  write_token(p, b, token, lse);
}

// ---- launches -------------------------------------------------------------------------------------

template <class T>
void take(T*& array, char*& next, int64_t num) {
  array = reinterpret_cast<T*>(next);
  next += round_up(num * int64_t(sizeof(T)), 256);
}

// Lays the arrays out from `base`; returns the bytes taken.
size_t lay_out(Scratch& scratch, char* base, const SampleParams& p) {
  scratch.batch_size = p.batch_size;
  scratch.row_stride = round_up(p.vocab_size, Vec<float>::kSize);
  scratch.num_chunks = int(ceil_div(p.vocab_size, kChunk));
  scratch.num_blocks = int(ceil_div(scratch.num_chunks, kScanWarps));
  scratch.capacity = min(kScanThreads, kMaxCandidates / scratch.num_blocks);
  char* next = base;
  take(scratch.chunks, next, p.batch_size * scratch.num_chunks);
  take(scratch.lists, next, 2 * p.batch_size * scratch.num_blocks);
  take(scratch.candidates, next, 2 * p.batch_size * scratch.num_blocks * scratch.capacity);
  take(scratch.penalised, next, p.repetition_penalty == nullptr ? 0 : p.batch_size * scratch.row_stride);
  return size_t(next - base);
}

template <bool kAligned, bool kPenalties>
void launch_scan(const SampleParams& p, const Scratch& scratch, Stream stream) {
  const unsigned grid = unsigned(p.batch_size * scratch.num_blocks);
  const size_t smem_bytes = sizeof(ScanStorage<kPenalties>);
  launch(scan_kernel<kAligned, kPenalties>,
         {.grid = grid, .block = kScanThreads, .smem_bytes = smem_bytes, .stream = stream}, p, scratch);
}

}  // namespace

void sample(const SampleParams& p, Stream stream) {
  Scratch scratch{};
  const StreamMemory memory(lay_out(scratch, nullptr, p), stream);
  lay_out(scratch, static_cast<char*>(memory.data()), p);
  const bool aligned = rows_aligned(p.logits, sizeof(float), p.logits_row_stride);
  if (p.repetition_penalty != nullptr) aligned ? launch_scan<true, true>(p, scratch, stream) : launch_scan<false, true>(p, scratch, stream);
  else aligned ? launch_scan<true, false>(p, scratch, stream) : launch_scan<false, false>(p, scratch, stream);
  launch(draw_kernel, {.grid = unsigned(p.batch_size), .block = kSelectThreads, .smem_bytes = sizeof(DrawStorage), .stream = stream}, p, scratch);
}

}  // namespace tilestream::cuda
