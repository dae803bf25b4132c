// Draws from parts of the vocabulary. Contract: shard_draw.h; weights and masses are those of sample.cu.
//
//   shard_histogram_kernel   a warp to 1,024 logits, in registers. Bins of 8 bits hold many neighbours, so each lane has bins of
//                            its own, in its own bank of shared memory: no two lanes of a warp add to one word
//   shard_masses_kernel      the same warps, a sum each
//   shard_draw_kernel        a block to a row: finds the chunk among their masses, and searches its 1,024 logits
// What the rounds so far have found of the threshold, each warp reads off the summed histograms itself: 2 KB a round from L2.
//
// Estimate at 32 rows of 16,032 logits (128,256 on 8 GPUs) on an H100, not measured: 3 us a histogram, 2 us the masses, 4 us the
// draw, by latency; the 7 collectives between them take longer.
#include "cuda/sample_draw.cuh"
#include "tilestream/shard_draw.h"

namespace tilestream::cuda {
namespace {

static_assert(kChunk == kMassChunk, "a warp's chunk is what shard_masses sums");
static_assert(kScanThreads == kHistogramBins, "a thread sums a bin over the lanes");

__device__ __forceinline__ bool draws(const ShardDrawParams& p, int64_t b) {
  return fabsf(p.maxima[b]) <= kFloatMax;
}

// ---- the threshold of top-p -----------------------------------------------------------------------

// Its leading bits, by the histograms of the rounds so far. All lanes of a warp call it.
__device__ __forceinline__ unsigned find_prefix(const ShardDrawParams& p, int64_t b) {
  constexpr int kOwn = kHistogramBins / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, last = kHistogramBins - 1 - lane * kOwn;
  unsigned prefix = 0;
  Mass need = 0;
  for (int round = 0; round < p.num_rounds; ++round) {
    const uint64_t* masses = p.histograms + (round * p.num_top_p + b) * kHistogramBins;
    Mass own[kOwn], sum = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum += own[j] = masses[last - j];
    const Mass scanned = warp_scan(sum);
    if (round == 0) need = needed_mass(p.top_p[b], __shfl_sync(kFullMask, scanned, kWarpSize - 1));
    Mass left = need - (scanned - sum);  // of the lane in which masses reach it
    int bin = last;
#pragma unroll
    for (int j = 0; j < kOwn - 1; ++j) {
      if (bin == last - j && own[j] < left) left -= own[j], --bin;
    }
    const unsigned reached = __ballot_sync(kFullMask, scanned >= need);
    const int lane_of_it = reached == 0 ? kWarpSize - 1 : __ffs(int(reached)) - 1;
    prefix = prefix << kHistogramBits | unsigned(__shfl_sync(kFullMask, bin, lane_of_it));
    need = __shfl_sync(kFullMask, left, lane_of_it);
  }
  return prefix;
}

// What the draw keeps of a row.
struct Kept {
  float max, inverse_scale, threshold, least_weight;

  __device__ __forceinline__ Kept(const ShardDrawParams& p, int64_t b)
      : max(p.maxima[b]), inverse_scale(inverse_scale_of(p.temperature[b])), threshold(-INFINITY), least_weight(p.min_p[b]) {
    if (b < p.num_top_p) threshold = from_ordered_bits(find_prefix(p, b));
    if (p.temperature[b] == 0.0f) threshold = max;
  }

  __device__ __forceinline__ Mass mass(float x) const {
    const float weight = weight_of(x, max, inverse_scale);
    return x < threshold || weight < least_weight ? 0 : fixed_point(weight);
  }
};

// ---- kernels --------------------------------------------------------------------------------------

// Where a warp of the grid is: kScanWarps chunks to a block, num_blocks to a row.
struct Place {
  int64_t b;
  int chunk;

  __device__ __forceinline__ explicit Place(int num_blocks)
      : b(blockIdx.x / num_blocks), chunk(int(blockIdx.x % num_blocks) * kScanWarps + int(threadIdx.x) / kWarpSize) {}
};

template <bool kAligned>
__device__ __forceinline__ void load(Chunk& c, const ShardDrawParams& p, const Place& at) {
  c.first_id = at.chunk * kChunk + threadIdx.x % kWarpSize * 4;
  load_chunk<kAligned>(c, p.logits + at.b * p.logits_row_stride, at.chunk, int(p.vocab_size));
}

struct HistogramStorage { unsigned low[kHistogramBins][kWarpSize], high[kHistogramBins][kWarpSize]; };  // words of masses

template <bool kAligned>
__global__ void __launch_bounds__(kScanThreads)
shard_histogram_kernel(const __grid_constant__ ShardDrawParams p, int num_blocks) {
  auto& s = dynamic_smem<HistogramStorage>();
  const Place at(num_blocks);
  if (!draws(p, at.b)) return;
  Chunk c;
  load<kAligned>(c, p, at);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  for (int i = thread; i < kHistogramBins * kWarpSize; i += kScanThreads) (&s.low[0][0])[i] = (&s.high[0][0])[i] = 0;
  const unsigned prefix = find_prefix(p, at.b);
  const float max = p.maxima[at.b], inverse_scale = inverse_scale_of(p.temperature[at.b]);
  const int shift = 32 - (p.num_rounds + 1) * kHistogramBits;
  __syncthreads();
  for_each(c, [&](float x, int) {
    const unsigned bits = ordered_bits(x) >> shift;
    if (bits >> kHistogramBits != prefix) return;
    const Mass mass = fixed_point(weight_of(x, max, inverse_scale));
    if (mass == 0) return;
    const unsigned bin = bits % kHistogramBins, low = unsigned(mass), before = atomicAdd(&s.low[bin][lane], low);
    const unsigned high = unsigned(mass >> 32) + (before + low < low);
    if (high != 0) atomicAdd(&s.high[bin][lane], high);
  });
  __syncthreads();
  Mass sum = 0;
#pragma unroll 8
  for (int i = 0; i < kWarpSize; ++i) {
    const int other = (thread + i) % kWarpSize;  // every lane another bank
    sum += Mass(s.high[thread][other]) << 32 | s.low[thread][other];
  }
  if (sum != 0) atomicAdd(reinterpret_cast<Mass*>(p.histogram + at.b * kHistogramBins + thread), sum);
}

template <bool kAligned>
__global__ void __launch_bounds__(kScanThreads)
shard_masses_kernel(const __grid_constant__ ShardDrawParams p, int num_blocks) {
  const Place at(num_blocks);
  const int64_t num_chunks = ceil_div(p.vocab_size, kChunk);
  if (at.chunk >= num_chunks) return;
  Mass own = 0;
  if (draws(p, at.b)) {
    Chunk c;
    load<kAligned>(c, p, at);
    const Kept kept(p, at.b);
    for_each(c, [&](float x, int) { own += kept.mass(x); });
  }
  own = warp_sum(own);
  if (threadIdx.x % kWarpSize == 0) p.chunk_masses[at.b * num_chunks + at.chunk] = own;
}

__global__ void __launch_bounds__(kSelectThreads) shard_draw_kernel(const __grid_constant__ ShardDrawParams p) {
  auto& s = dynamic_smem<DrawStorage>();
  const int64_t b = blockIdx.x;
  Mass below = 0, total = 0;
  for (int rank = 0; rank < p.world_size; ++rank) {
    const Mass mass = p.masses[rank * p.batch_size + b];
    below += rank < p.rank ? mass : 0;
    total += mass;
  }
  const uint64_t random = p.temperature[b] == 0.0f ? 0 : philox(uint64_t(p.seeds[b]), uint64_t(p.positions[b]));
  const Mass target = __umul64hi(random, total);
  if (!draws(p, b) || target < below || target - below >= p.masses[p.rank * p.batch_size + b]) {
    if (threadIdx.x == 0) p.tokens[b] = -1;
    return;
  }
  const Kept kept(p, b);
  const int num_chunks = int(ceil_div(p.vocab_size, kChunk));
  const Mass mass = int(threadIdx.x) < num_chunks ? p.chunk_masses[b * num_chunks + threadIdx.x] : 0;
  find_chunk(s, mass, block_scan(s.select, mass), target - below);
  const Logits chunk = chunk_of(p.logits + b * p.logits_row_stride, p.vocab_size, s.chunk);
  const int64_t id = find_id(s, chunk, s.left + 1, [&](Key key) { return kept.mass(logit_of(key)); });
  if (threadIdx.x == 0) p.tokens[b] = p.first_id + id;
}

// One of a kernel's two instances, on the first num_rows rows.
template <class Kernel>
void launch_chunks(Kernel aligned, Kernel unaligned, const ShardDrawParams& p, int64_t num_rows, size_t smem_bytes,
                   Stream stream) {
  const int num_blocks = int(ceil_div(ceil_div(p.vocab_size, kChunk), kScanWarps));
  const unsigned grid = unsigned(num_rows * num_blocks);
  launch(rows_aligned(p.logits, sizeof(float), p.logits_row_stride) ? aligned : unaligned,
         {.grid = grid, .block = kScanThreads, .smem_bytes = smem_bytes, .stream = stream}, p, num_blocks);
}

}  // namespace

void shard_histogram(const ShardDrawParams& p, Stream stream) {
  launch_chunks(shard_histogram_kernel<true>, shard_histogram_kernel<false>, p, p.num_top_p, sizeof(HistogramStorage), stream);
}

void shard_masses(const ShardDrawParams& p, Stream stream) {
  launch_chunks(shard_masses_kernel<true>, shard_masses_kernel<false>, p, p.batch_size, 0, stream);
}

void shard_draw(const ShardDrawParams& p, Stream stream) {
  launch(shard_draw_kernel,
         {.grid = unsigned(p.batch_size), .block = kSelectThreads, .smem_bytes = sizeof(DrawStorage), .stream = stream}, p);
}

}  // namespace tilestream::cuda
