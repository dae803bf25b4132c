// Part of sample.cpp: the top-p threshold, the draw.
//
// Top-p without a sort: the largest logit x such that the mass of all logits >= x reaches top_p of the whole. A guess from
// the lane maxima and a sample of the other logits gives a range that holds x nearly always; one pass sums the masses above
// the range and in all, and lists the logits inside it (a few per cent); x is selected among those. A range that the sums
// prove wrong is replaced by all that lies beyond it, so that the guess costs time, never the answer.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/sample_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int kBins = 512;               // of the guess
constexpr float kBinsPerOctave = 11.5f;  // the last bin begins 44.5 octaves down, where masses vanish
constexpr float kBinRatio = 0.94151111f;  // 2^(-1 / kBinsPerOctave)
constexpr long kSampledBlocks = 2;       // every 2nd block gives one vector to the sample
constexpr double kDeviations = 3.0;      // half the width of the range, in standard deviations of the guess

// ---- masses -------------------------------------------------------------------------------------

// The sum of kept masses, n a multiple of 16.
uint64_t kept_mass(const Row& r, const float* x, long n) {
  FixedSum sum = no_mass();
  for (long i = 0; i < n; i += kLanes) sum = add_mass(sum, kept_weights(r, load(x + i)));
  return reduce_mass(sum);
}

uint64_t chunk_kept_mass(const Row& r, long chunk) {
  alignas(64) float padded[kBlock];
  uint64_t sum = 0;
  for (long b = chunk * (kChunk / kBlock); b < block_end(r, chunk); ++b) {
    sum += kept_mass(r, block_of(r, r.x, b, padded), kBlock);
  }
  return sum;
}

// ---- top-p --------------------------------------------------------------------------------------

struct Range { float low, high; };  // low <= x < high

// Adds weights to the bins of their logits. Neighbours often share a bin: in tables of their own, they need not wait for
// the previous one's store.
void add_to_bins(const Row& r, F32x16 x, F32x16 w, float (*bins)[4]) {
  alignas(64) float position[kLanes], weight[kLanes];
  store(position, min(mul(sub(set1(r.max), x), set1(r.inverse_scale * kBinsPerOctave)), set1(float(kBins - 1))));
  store(weight, w);
  for (long i = 0; i < kLanes; ++i) bins[int(position[i])][i % 4] += weight[i];
}

// A range in which the top-p threshold probably lies. Each 16 logits behind one lane maximum are that maximum, exactly, and
// 15 others, which a random one of the 16 stands for (with weight 16, and 0 if it is the maximum itself).
Range guess_range(const Row& r, float top_p) {
  constexpr float kMultiple = float(kBlock / kLanes * kSampledBlocks);
  alignas(64) float largest[kBins][4] = {}, others[kBins][4] = {};
  for (long b = 0; b < r.num_blocks; ++b) {
    const F32x16 most = load(r.lane_max + b * kLanes);
    add_to_bins(r, most, weights(r, most), largest);
    if (b % kSampledBlocks != 0 || (b + 1) * kBlock > r.vocab_size) continue;
    const F32x16 x = load(r.x + b * kBlock), w = weights(r, x);
    add_to_bins(r, x, mul(sub(w, where_ge(x, most, w)), set1(kMultiple)), others);
  }
  double mass[kBins], variance[kBins], total = 0.0;
  float weight = 1.0f;
  for (int i = 0; i < kBins; ++i, weight *= kBinRatio) {
    const float sampled = others[i][0] + others[i][1] + others[i][2] + others[i][3];
    mass[i] = sampled + largest[i][0] + largest[i][1] + largest[i][2] + largest[i][3];
    variance[i] = sampled * weight * kMultiple;
    total += mass[i];
  }
  // The fraction above a logit errs by what the sample errs above it, times 1 - top_p, and below it, times top_p.
  const double need = top_p * total;
  double above = 0.0, squares = 0.0;
  for (int i = 0; i < kBins; ++i) {
    const double share = above < need ? 1.0 - top_p : top_p;
    squares += share * share * variance[i];
    above += mass[i];
  }
  const double slack = kDeviations * std::sqrt(squares);
  const float bin_width = 1.0f / (r.inverse_scale * kBinsPerOctave);
  int first = 0, last = 0;
  for (above = mass[0]; first < kBins - 1 && above < need - slack;) above += mass[++first];
  for (last = first; last < kBins - 1 && above < need + slack;) above += mass[++last];
  return {last == kBins - 1 ? -FLT_MAX : r.max - float(last + 1) * bin_width,
          first == 0 ? INFINITY : r.max - float(first) * bin_width};
}

// Mass of one chunk in all and above the range, mass and list of the logits inside it.
void weigh_chunk(Row& r, long chunk, Range range) {
  alignas(64) float padded[kBlock];
  const F32x16 low = set1(range.low), high = set1(range.high);
  FixedSum total = no_mass(), above = no_mass();
  float* const list = r.list_x + chunk * kSegment;
  long n = 0;
  for (long b = chunk * (kChunk / kBlock); b < block_end(r, chunk); ++b) {
    const float* p = block_of(r, r.x, b, padded);
    for (long i = 0; i < kBlock; i += kLanes) {
      const F32x16 x = load(p + i), w = weights(r, x);
      total = add_mass(total, w);
      above = add_mass_ge(above, x, high, w);
      n += store_lanes(list + n, x, lanes_ge(x, low) & ~lanes_ge(x, high));
    }
  }
  store(list + n, set1(-INFINITY));
  r.list_count[chunk] = n;
  r.chunk_total[chunk] = reduce_mass(total);
  r.chunk_mass[chunk] = reduce_mass(above);
  r.chunk_inside[chunk] = kept_masses(r, list, n, r.list_mass + chunk * kSegment);
}

// Sets r.threshold to top-p's, and r.chunk_mass to what is kept.
void find_top_p(Row& r, float top_p) {
  Range range = guess_range(r, top_p);
  while (true) {
    for_chunks(r, [&](long c) { weigh_chunk(r, c, range); });
    uint64_t total = 0, above = 0, inside = 0;
    long num = 0;
    for (long c = 0; c < r.num_chunks; ++c) {
      total += r.chunk_total[c];
      above += r.chunk_mass[c];
      inside += r.chunk_inside[c];
      num = add_keys(r, num, r.list_x + c * kSegment, r.list_mass + c * kSegment, r.list_count[c]);
    }
    const uint64_t need = needed_mass(top_p, total);
    if (need > above && need <= above + inside) {
      r.threshold = select(r, num, need - above);
      break;
    }
    range = need <= above ? Range{range.high, INFINITY} : Range{-FLT_MAX, range.low};
  }
  for (long c = 0; c < r.num_chunks; ++c) {
    r.chunk_mass[c] += kept_mass(r, r.list_x + c * kSegment, round_up(r.list_count[c], kLanes));
  }
}

// ---- the draw -----------------------------------------------------------------------------------

// Top-p, min-p and the draw over a list of n candidates, the row's maximum among them.
int64_t draw_from_list(Row& r, long n, float top_p, float min_p, uint64_t random_bits) {
  store(r.list_x + n, set1(-INFINITY));
  uint64_t total = kept_masses(r, r.list_x, n, r.list_mass);
  if (top_p < 1.0f) {
    r.threshold = select(r, add_keys(r, 0, r.list_x, r.list_mass, n), needed_mass(top_p, total));
  }
  r.least_weight = min_p;
  total = kept_masses(r, r.list_x, n, r.list_mass);
  const uint64_t target = scaled_draw(random_bits, total);
  long i = 0;
  for (uint64_t below = r.list_mass[0]; below <= target; below += r.list_mass[i]) ++i;
  return r.list_id[i];
}

// The same over the whole row.
int64_t draw_from_row(Row& r, float top_p, float min_p, uint64_t random_bits) {
  if (top_p < 1.0f) find_top_p(r, top_p);
  r.least_weight = min_p;
  if (top_p == 1.0f || min_p > 0.0f) {
    for_chunks(r, [&](long c) { r.chunk_mass[c] = chunk_kept_mass(r, c); });
  }
  uint64_t total = 0, below = 0;
  for (long c = 0; c < r.num_chunks; ++c) total += r.chunk_mass[c];
  const uint64_t target = scaled_draw(random_bits, total);
  long chunk = 0;
  while (below + r.chunk_mass[chunk] <= target) below += r.chunk_mass[chunk++];
  alignas(64) float padded[kBlock];
  for (long b = chunk * (kChunk / kBlock);; ++b) {  // ends: the chunk's masses sum to more than target - below
    const float* x = block_of(r, r.x, b, padded);
    const uint64_t mass = kept_mass(r, x, kBlock);
    if (below + mass <= target) {
      below += mass;
      continue;
    }
    kept_masses(r, x, kBlock, r.list_mass);
    long i = 0;
    for (below += r.list_mass[0]; below <= target; below += r.list_mass[i]) ++i;
    return b * kBlock + i;
  }
}

}  // namespace
}  // namespace tilestream::cpu::TILESTREAM_LEVEL
