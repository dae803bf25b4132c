// Shuffles, votes, reductions and matches of a warp.
#pragma once

#include "simt/twin.h"

namespace simt {

// A lane's value, and the lane whose value it takes.
template <class T>
struct Shuffle { T value; int source; };

template <class T>
SIMT_TWIN T shuffle(const char* what, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  Shuffle<T> mine{value, source};
  warp_collective(what, mask, &mine, [](LaneArguments lanes) {
    T values[kWarpSize] = {};
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] != nullptr) values[i] = static_cast<Shuffle<T>*>(lanes[i])->value;
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] == nullptr) continue;
      auto& lane = *static_cast<Shuffle<T>*>(lanes[i]);
      // A lane outside the mask has no value to give (CUDA: undefined): poison.
      if (lanes[lane.source] != nullptr) lane.value = values[lane.source];
      else __builtin_memset(static_cast<void*>(&lane.value), 0xff, sizeof(T));
    }
  });
  return mine.value;
}

template <class T, class Result>
struct LaneOf { T value; Result result; };

// Every lane gets combine(all lanes' values).
template <class T, class F>
SIMT_TWIN T redux(const char* what, uint32_t mask, T value, F) {
  LaneOf<T, T> mine{value, {}};
  warp_collective(what, mask, &mine, [](LaneArguments lanes) {
    T all{};
    bool first = true;
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] == nullptr) continue;
      const T v = static_cast<LaneOf<T, T>*>(lanes[i])->value;
      all = first ? v : F{}(all, v);
      first = false;
    }
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if (lanes[i] != nullptr) static_cast<LaneOf<T, T>*>(lanes[i])->result = all;
    }
  });
  return mine.result;
}

struct Ballot {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
SIMT_TWIN uint32_t ballot(const char* what, uint32_t mask, bool predicate) {
  return redux(what, mask, uint32_t(predicate) << self().lane, Ballot{});
}

}  // namespace simt

// CUDA C++ Programming Guide, "Warp Shuffle Functions": a source outside the segment of `width` lanes is the lane itself.
template <class T>
SIMT_TWIN T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = simt::self().lane;
  return simt::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
SIMT_TWIN T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::self().lane, in_segment = lane & (width - 1);
  return simt::shuffle("__shfl_up_sync", mask, value, in_segment >= int(delta) ? lane - int(delta) : lane);
}
template <class T>
SIMT_TWIN T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::self().lane, in_segment = lane & (width - 1);
  return simt::shuffle("__shfl_down_sync", mask, value, in_segment + int(delta) < width ? lane + int(delta) : lane);
}
template <class T>
SIMT_TWIN T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = simt::self().lane, other = lane ^ lane_mask;
  // Groups of `width` may read from lower groups, not from higher ones.
  return simt::shuffle("__shfl_xor_sync", mask, value, other / width <= lane / width ? other : lane);
}

SIMT_TWIN unsigned __ballot_sync(unsigned mask, int p) { return simt::ballot("__ballot_sync", mask, p != 0); }
SIMT_TWIN int __any_sync(unsigned mask, int p) { return simt::ballot("__any_sync", mask, p != 0) != 0; }
SIMT_TWIN int __all_sync(unsigned mask, int p) { return simt::ballot("__all_sync", mask, p == 0) == 0; }
SIMT_TWIN void __syncwarp(unsigned mask = simt::kFullMask) {
  simt::warp_collective("__syncwarp", mask, nullptr, [](simt::LaneArguments) {}, true);
}

// redux.sync: sm_80, 32-bit integers.
#define SIMT_REDUX(NAME, T, EXPRESSION)                                                                   \
  namespace simt { struct NAME##_op { T operator()(T a, T b) const { return EXPRESSION; } }; }            \
  SIMT_TWIN T __reduce_##NAME##_sync(unsigned mask, T value) {                                            \
    return simt::redux("__reduce_" #NAME "_sync", mask, value, simt::NAME##_op{});                        \
  }
SIMT_REDUX(add, unsigned, a + b)
SIMT_REDUX(and, unsigned, a & b)
SIMT_REDUX(or, unsigned, a | b)
SIMT_REDUX(xor, unsigned, a ^ b)
SIMT_REDUX(min, unsigned, a < b ? a : b)
SIMT_REDUX(max, unsigned, a > b ? a : b)
namespace simt {
struct smin_op { int operator()(int a, int b) const { return a < b ? a : b; } };
struct smax_op { int operator()(int a, int b) const { return a > b ? a : b; } };
}  // namespace simt
SIMT_TWIN int __reduce_add_sync(unsigned mask, int v) { return int(__reduce_add_sync(mask, unsigned(v))); }
SIMT_TWIN int __reduce_min_sync(unsigned mask, int v) { return simt::redux("__reduce_min_sync", mask, v, simt::smin_op{}); }
SIMT_TWIN int __reduce_max_sync(unsigned mask, int v) { return simt::redux("__reduce_max_sync", mask, v, simt::smax_op{}); }
#undef SIMT_REDUX

// Lanes of the mask whose value has the same bits.
template <class T>
SIMT_TWIN unsigned __match_any_sync(unsigned mask, T value) {
  simt::LaneOf<T, unsigned> mine{value, 0};
  simt::warp_collective("__match_any_sync", mask, &mine, [](simt::LaneArguments lanes) {
    using Lane = simt::LaneOf<T, unsigned>;
    for (unsigned i = 0; i < 32; ++i) {
      for (unsigned j = 0; j < 32; ++j) {
        if (lanes[i] == nullptr || lanes[j] == nullptr) continue;
        Lane &a = *static_cast<Lane*>(lanes[i]), &b = *static_cast<Lane*>(lanes[j]);
        if (__builtin_memcmp(&a.value, &b.value, sizeof(T)) == 0) a.result |= 1u << j;
      }
    }
  });
  return mine.result;
}
