// Sums and selection over one row of logits by one block, in integers: no result depends on an order.
#pragma once

#include "cuda/common/reduce.cuh"

namespace tilestream::cuda {

using Mass = unsigned long long;  // fixed point, or a count
using Key = unsigned long long;   // orders logits: see key_of

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kDigitBits = 11;  // of a key, by one pass: a float takes 3
constexpr int kBins = 1 << kDigitBits;

struct SelectStorage {
  Mass bins[kBins];
  Mass partials[kRowWarps];
  int found_bin;
  Mass found_above, found_mass;
};

// Larger logits have larger keys (-0 and +0 are one value), and of equal ones the lower id.
__device__ __forceinline__ Key key_of(float x, int64_t id) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return Key(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) << 32 | (0xffffffffu - unsigned(id));
}
__device__ __forceinline__ float logit_of(Key key) {
  const unsigned ordered = unsigned(key >> 32);
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ int64_t id_of(Key key) { return 0xffffffffu - unsigned(key); }

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
  if (warp == 0) {
    const Mass up_to = warp_scan(lane < kRowWarps ? s.partials[lane] : 0);
    if (lane < kRowWarps) s.partials[lane] = up_to;
  }
  __syncthreads();
  const Scan result{scanned - v + (warp > 0 ? s.partials[warp - 1] : 0), s.partials[kRowWarps - 1]};
  __syncthreads();
  return result;
}

__device__ __forceinline__ Key block_max(SelectStorage& s, Key v) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    v = max(v, __shfl_xor_sync(kFullMask, v, distance));
  if (threadIdx.x % kWarpSize == 0) s.partials[threadIdx.x / kWarpSize] = v;
  __syncthreads();
  for (int w = 0; w < kRowWarps; ++w) v = max(v, s.partials[w]);
  __syncthreads();
  return v;
}

// The bin in which the masses, summed from the last bin down, reach `need`. Returns the sum of all; found_*
// stay as they are where that is less.
__device__ __forceinline__ Mass find_bin(SelectStorage& s, Mass need) {
  constexpr int kOwn = kBins / kRowThreads;
  const int last = kBins - 1 - int(threadIdx.x) * kOwn;
  Mass own = 0;
  for (int j = 0; j < kOwn; ++j) own += s.bins[last - j];
  Scan scan = block_scan(s, own);
  for (int j = 0; j < kOwn; ++j) {
    const Mass mass = s.bins[last - j];
    if (scan.below < need && need <= scan.below + mass) {
      s.found_bin = last - j;
      s.found_above = scan.below;
      s.found_mass = mass;
    }
    scan.below += mass;
  }
  __syncthreads();
  return scan.total;
}

// The largest key such that the masses of all keys from it on sum to `need` or more (0 when they do not):
// key(i) and mass(i) for i < num. A pass finds the next 11 bits of it, and the passes end when all that share
// those found are taken.
template <class KeyAt, class MassAt>
__device__ __forceinline__ Key select_key(SelectStorage& s, int64_t num, Mass need, KeyAt key_at,
                                          MassAt mass_at) {
  Key prefix = 0;
  for (int known = 0;;) {  // bits of the prefix
    const int width = min(kDigitBits, 64 - known), shift = 64 - known - width;
    for (int i = threadIdx.x; i < kBins; i += kRowThreads) s.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < num; i += kRowThreads) {
      const Key key = key_at(i);
      if (known > 0 && key >> (64 - known) != prefix) continue;
      const Mass mass = mass_at(i);
      if (mass != 0) atomicAdd(&s.bins[key >> shift & (kBins - 1)], mass);
    }
    __syncthreads();
    if (find_bin(s, need) <= need && known == 0) return 0;
    prefix = prefix << width | Key(s.found_bin);
    known += width;
    need -= s.found_above;
    if (s.found_mass == need || shift == 0) return prefix << shift;
  }
}

}  // namespace tilestream::cuda
