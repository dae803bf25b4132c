// Twin of csrc/cuda/ptx/multimem.cuh: a loop over the ranks of simt::make_multicast, in their order.
#pragma once

#include "cuda/runtime.cuh"
#include "simt/async.h"
#include "simt/ranks.h"

namespace simt {

// One element's value and bits; kBits wide.
struct MultimemF32 {
  using Word = unsigned;
  static float value(Word b) { return bits<float>(b); }
  static Word narrowed(float x) { return bits<Word>(x); }
};
struct MultimemF16 {
  using Word = unsigned short;
  static float value(Word b) { return widen<5, 10>(b); }
  static Word narrowed(float x) { return Word(narrow<5, 10>(x)); }
};
struct MultimemBF16 {
  using Word = unsigned short;
  static float value(Word b) { return widen<8, 7>(b); }
  static Word narrowed(float x) { return Word(narrow<8, 7>(x)); }
};

template <class Element, class V>
SIMT_TWIN V multimem_sum(const char* what, const void* p) {
  using Word = typename Element::Word;
  preempt();
  V result;
  Word words[16 / sizeof(Word)];
  float sums[16 / sizeof(Word)] = {};
  for (void* peer : peers(what, p, 16)) {
    read_global(what, peer, 16);
    for (size_t i = 0; i < 16 / sizeof(Word); ++i)
      sums[i] += Element::value(__atomic_load_n(static_cast<Word*>(peer) + i, __ATOMIC_RELAXED));
  }
  for (size_t i = 0; i < 16 / sizeof(Word); ++i) words[i] = Element::narrowed(sums[i]);
  __builtin_memcpy(&result, words, 16);
  return result;
}

template <class Element, class V>
SIMT_TWIN void multimem_add(const char* what, void* p, V v) {
  using Word = typename Element::Word;
  preempt();
  Word words[16 / sizeof(Word)];
  __builtin_memcpy(words, &v, 16);
  for (void* peer : peers(what, p, 16)) {
    for (size_t i = 0; i < 16 / sizeof(Word); ++i)
      exchange_word(static_cast<Word*>(peer) + i,
                    [&](Word old) { return Element::narrowed(Element::value(old) + Element::value(words[i])); });
  }
}

template <class V>
SIMT_TWIN void multimem_store(void* p, V v) {
  preempt();
  unsigned words[sizeof(V) / 4];
  __builtin_memcpy(words, &v, sizeof v);
  for (void* peer : peers("multimem.st", p, sizeof v)) {
    write_global("multimem.st", peer, sizeof v);
    for (size_t i = 0; i < sizeof v / 4; ++i) __atomic_store_n(static_cast<unsigned*>(peer) + i, words[i], __ATOMIC_RELAXED);
  }
}

}  // namespace simt

namespace tilestream::ptx {

constexpr bool kHasMultimem = true;

SIMT_TWIN float4 multimem_ld_reduce_add_f32(const void* p) {
  return simt::multimem_sum<simt::MultimemF32, float4>("multimem.ld_reduce", p);
}
SIMT_TWIN uint4 multimem_ld_reduce_add_f16x2(const void* p) {
  return simt::multimem_sum<simt::MultimemF16, uint4>("multimem.ld_reduce", p);
}
SIMT_TWIN uint4 multimem_ld_reduce_add_bf16x2(const void* p) {
  return simt::multimem_sum<simt::MultimemBF16, uint4>("multimem.ld_reduce", p);
}
SIMT_TWIN void multimem_st(void* p, uint4 v) { simt::multimem_store(p, v); }
SIMT_TWIN void multimem_st_b64(void* p, uint2 v) { simt::multimem_store(p, v); }
SIMT_TWIN void multimem_st_b32(void* p, unsigned v) { simt::multimem_store(p, v); }
SIMT_TWIN void multimem_red_add_f32(void* p, float4 v) { simt::multimem_add<simt::MultimemF32>("multimem.red", p, v); }
SIMT_TWIN void multimem_red_add_f16x2(void* p, uint4 v) { simt::multimem_add<simt::MultimemF16>("multimem.red", p, v); }
SIMT_TWIN void multimem_red_add_bf16x2(void* p, uint4 v) { simt::multimem_add<simt::MultimemBF16>("multimem.red", p, v); }
SIMT_TWIN void multimem_red_add_release_sys(unsigned* p, unsigned v) {
  simt::preempt();
  for (void* peer : simt::peers("multimem.red", p, 4)) __atomic_fetch_add(static_cast<unsigned*>(peer), v, __ATOMIC_ACQ_REL);
}

}  // namespace tilestream::ptx
