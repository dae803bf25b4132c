// Sampling: filters without sorting, a seeded draw, log-probabilities. Contract: sample.h.
//
// Two launches, and no block waits for another. The scan (sample_scan.cuh) reads the logits, spread over all
// SMs, and leaves of each row a record per 1,024 logits and a list of its largest. The draw (sample_draw.cuh)
// takes a row to a block, and seldom looks at a logit again:
//   greedy     the records have the maximum;
//   no filter  the records have the chunk in which the draw falls;
//   filters    thresholds are searched for in the list, which holds all logits from some bound on. Where that
//              does not reach (a flat distribution, many ties) this one block reads its row again from L2.
// Masses are fixed point and sums of them integers, so that answers do not depend on the order of threads.
//
// Estimate at 32 x 128,256 on an H200, not measured. Scan: 4.7 us (16.4 MB at 4.2 TB/s, 0.8 us to fill and
// drain; the rest of its work in their shadow). Launch of the draw: 1 us in a graph. Draw: 1 us for records
// and list, then 2 or 3 searches of 2 passes at 0.3 us; a row that is read again adds 4 passes of 6 us (513 KB
// at 50 bytes a clock). Bound by memory in the scan, by latency in the draw.
// Sources: Philox4x32-10, Salmon et al. 2011; top-p, Holtzman et al. 2019; min-p, Nguyen et al. 2024.
#include "cuda/sample_draw.cuh"

namespace tilestream::cuda {
namespace {

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
__device__ __forceinline__ void write_top(DrawStorage& s, const SampleParams& p, int64_t b,
                                          const Items& items, Key least, double lse) {
  const int k = p.num_top_logprobs, t = threadIdx.x;
  if (t == 0) s.num_top = 0;
  __syncthreads();
  items.for_each([&](Key key) {
    if (key >= least && logit_of(key) >= -kFloatMax) s.top[atomicAdd(&s.num_top, 1)] = key;
  });
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

__device__ __forceinline__ void write_top_logprobs(DrawStorage& s, const SampleParams& p,
                                                   const Scratch& scratch, int64_t b, unsigned highest,
                                                   double lse) {
  const unsigned lowest = load_list(s, scratch, kRaw, b);
  const Candidates list{s.list, s.num_list};
  Key least = 0;
  if (lowest != 0xffffffffu &&
      (find_top_k(s, list, p.vocab_size, lowest, highest, p.num_top_logprobs, least) || lowest == 0))
    return write_top(s, p, b, list, least, lse);
  const Logits logits{p.logits + b * p.logits_row_stride, 0, int(p.vocab_size)};
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
    const float own =
        record.raw_sum == 0.0f ? 0.0f : record.raw_sum * expf(logit_of(record.raw_best) - raw_most);
    lse = double(raw_most) + log(double(block_sum(own, s.sums)));
  }
  if (p.num_top_logprobs > 0) write_top_logprobs(s, p, scratch, b, logit_bits_of(raw_best), lse);
  const Key best = rule.penalties ? block_max(s.select, record.best) : raw_best;
  if (!is_valid(best)) return write_invalid(p, b);
  if (rule.greedy) return write_token(p, b, id_of(best), lse);

  const uint64_t random = philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
  Row row{p.vocab_size, logit_of(best), rule.inverse_scale, random, 0};
  const float* x =
      rule.penalties ? scratch.penalised + b * scratch.row_stride : p.logits + b * p.logits_row_stride;
  const float scale = record.mass == 0 ? 0.0f : row.weight(record.best);
  const Mass mass = Mass(double(record.mass) * double(scale));
  const Scan scan = block_scan(s.select, mass);
  row.total = scan.total;
  if (!rule.filtered) return write_token(p, b, draw_unfiltered(s, record, mass, scan, scale, x, row), lse);

  const unsigned lowest = load_list(s, scratch, kSampled, b);
  int64_t token = -1;
  if (lowest != 0xffffffffu) token = draw(s, Candidates{s.list, s.num_list}, lowest, row, rule);
  if (token < 0) token = draw(s, Logits{x, 0, int(p.vocab_size)}, 0, row, rule);
  write_token(p, b, token, lse);
}

// ---- launches -------------------------------------------------------------------------------------

template <class T>
void take(T*& array, char*& next, int64_t num) {
  array = reinterpret_cast<T*>(next);
  next += round_up(num * int64_t(sizeof(T)), 256);
}

// Lays the arrays out from `base`; returns the bytes taken.
int64_t lay_out(Scratch& scratch, char* base, const SampleParams& p) {
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
  return next - base;
}

template <bool kAligned, bool kPenalties>
void launch_scan(const SampleParams& p, const Scratch& scratch, Stream stream) {
  const unsigned grid = unsigned(p.batch_size * scratch.num_blocks);
  const size_t smem_bytes = sizeof(ScanStorage<kPenalties>);
  launch(scan_kernel<kAligned, kPenalties>,
         {.grid = grid, .block = kScanThreads, .smem_bytes = smem_bytes, .stream = stream}, p, scratch);
}

}  // namespace

int64_t workspace_bytes(const SampleParams& p) {
  Scratch scratch{};
  return lay_out(scratch, nullptr, p);
}

void sample(const SampleParams& p, Stream stream) {
  Scratch scratch{};
  lay_out(scratch, static_cast<char*>(p.workspace), p);
  const bool aligned = rows_aligned(p.logits, sizeof(float), p.logits_row_stride);
  if (p.repetition_penalty != nullptr)
    aligned ? launch_scan<true, true>(p, scratch, stream) : launch_scan<false, true>(p, scratch, stream);
  else aligned ? launch_scan<true, false>(p, scratch, stream) : launch_scan<false, false>(p, scratch, stream);
  launch(draw_kernel,
         {.grid = unsigned(p.batch_size),
          .block = kSelectThreads,
          .smem_bytes = sizeof(DrawStorage),
          .stream = stream},
         p, scratch);
}

}  // namespace tilestream::cuda
