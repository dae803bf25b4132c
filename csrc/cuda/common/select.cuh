// Sums and selection by one block, in integers: no result depends on an order.
#pragma once

#include "cuda/common/reduce.cuh"

namespace tilestream::cuda {

using Mass = unsigned long long;  // fixed point, or a count
using Key = unsigned long long;   // orders logits: see key_of

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / kWarpSize;  // as many as a warp has lanes
constexpr int kDigitBits = 11;  // of a key, by one pass
constexpr int kBins = 1 << kDigitBits;

struct SelectStorage {
  unsigned low[kBins], high[kBins];  // words of a mass: shared memory adds 64 bits only by a loop
  Mass partials[kSelectWarps];
  int found_bin;
  Mass found_above, found_mass;
};

// Larger logits have larger bits; -0 and +0 are one value.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered_bits(unsigned ordered) {
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ unsigned id_bits(int64_t id) { return 0xffffffffu - unsigned(id); }

// Larger logits have larger keys, and of equal ones the lower id.
__device__ __forceinline__ Key key_of(float x, int64_t id) {
  return Key(ordered_bits(x)) << 32 | id_bits(id);
}
__device__ __forceinline__ unsigned id_bits_of(Key key) { return unsigned(key); }
__device__ __forceinline__ unsigned logit_bits_of(Key key) { return unsigned(key >> 32); }
__device__ __forceinline__ float logit_of(Key key) { return from_ordered_bits(logit_bits_of(key)); }
__device__ __forceinline__ int64_t id_of(Key key) { return 0xffffffffu - unsigned(key); }

__device__ __forceinline__ Mass warp_sum(Mass v) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(kFullMask, v, distance);
  return v;
}

// Sum of v over the lanes up to this one.
__device__ __forceinline__ Mass warp_scan(Mass v) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Mass lower = __shfl_up_sync(kFullMask, v, distance);
    if (int(threadIdx.x % kWarpSize) >= distance) v += lower;
  }
  return v;
}

struct Scan { Mass below, total; };  // of the threads before this one, and of all

__device__ __forceinline__ Scan block_scan(SelectStorage& s, Mass v) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Mass scanned = warp_scan(v);
  if (lane == kWarpSize - 1) s.partials[warp] = scanned;
  __syncthreads();
  if (warp == 0) s.partials[lane] = warp_scan(s.partials[lane]);
  __syncthreads();
  const Scan result{scanned - v + (warp > 0 ? s.partials[warp - 1] : 0), s.partials[kSelectWarps - 1]};
  __syncthreads();
  return result;
}

__device__ __forceinline__ Key warp_max(Key v) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    v = max(v, __shfl_xor_sync(kFullMask, v, distance));
  return v;
}

__device__ __forceinline__ Key block_max(SelectStorage& s, Key v) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  v = warp_max(v);
  if (lane == 0) s.partials[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_max(s.partials[lane]);
    if (lane == 0) s.partials[0] = v;
  }
  __syncthreads();
  v = s.partials[0];
  __syncthreads();
  return v;
}

__device__ __forceinline__ void add_to_bin(SelectStorage& s, unsigned bin, Mass mass) {
  const unsigned low = unsigned(mass), before = atomicAdd(&s.low[bin], low);
  const unsigned high = unsigned(mass >> 32) + (before + low < low);
  if (high != 0) atomicAdd(&s.high[bin], high);
}

// The bin in which the masses, summed from the last bin down, reach `need`. Returns the sum of all; found_*
// stay as they are where that is less.
__device__ __forceinline__ Mass find_bin(SelectStorage& s, Mass need) {
  constexpr int kOwn = kBins / kSelectThreads;
  const int last = kBins - 1 - int(threadIdx.x) * kOwn;
  Mass own[kOwn], sum = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) sum += own[j] = Mass(s.high[last - j]) << 32 | s.low[last - j];
  Scan scan = block_scan(s, sum);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (scan.below < need && need <= scan.below + own[j]) {
      s.found_bin = last - j;
      s.found_above = scan.below;
      s.found_mass = own[j];
    }
    scan.below += own[j];
  }
  __syncthreads();
  return scan.total;
}

// From which bits on masses sum to what is needed; `need` is what those above leave, `mass` that of the last
// taken. Where the sum of all is less, reached is false.
struct Threshold {
  bool reached;
  unsigned bits;
  Mass need, mass;
};

// The largest `bits` such that the masses of all keys from it on sum to `need` or more: bits_of(key) and
// mass_of(key) for the keys of `items`. It is looked for from `lowest` to `highest`; where it lies elsewhere,
// reached is false. A pass finds the next 11 bits of it, and the passes end when all that share those found
// are taken; kExact: not before, so that some key with a mass has these bits.
template <bool kExact = false, class Items, class BitsOf, class MassOf>
__device__ __forceinline__ Threshold select(SelectStorage& s, const Items& items, Mass need, unsigned lowest,
                                            unsigned highest, BitsOf bits_of, MassOf mass_of) {
  constexpr int kKeyBits = 32;
  const int shared = min(__clz(int(lowest ^ highest)), kKeyBits - 1);  // leading bits that all share
  unsigned prefix = shared == 0 ? 0 : highest >> (kKeyBits - shared);
  for (int known = shared;;) {  // bits of the prefix
    const int width = min(kDigitBits, kKeyBits - known), shift = kKeyBits - known - width;
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.low[i] = s.high[i] = 0;
    __syncthreads();
    Mass own_above = 0;
    items.for_each([&](Key key) {
      const unsigned bits = bits_of(key);
      if (known == shared && bits > highest) own_above += mass_of(key);
      if (bits < lowest || bits > highest || (known > 0 && bits >> (kKeyBits - known) != prefix)) return;
      const Mass mass = mass_of(key);
      if (mass != 0) add_to_bin(s, bits >> shift & ((1u << width) - 1), mass);
    });
    if (known == shared) {
      const Mass above = block_scan(s, own_above).total;
      if (above >= need) return {false, 0, need, 0};
      need -= above;
    }
    __syncthreads();
    if (find_bin(s, need) < need) return {false, 0, need, 0};
    prefix = prefix << width | unsigned(s.found_bin);
    known += width;
    need -= s.found_above;
    if (shift == 0 || (!kExact && s.found_mass == need)) return {true, prefix << shift, need, s.found_mass};
  }
}

}  // namespace tilestream::cuda
