// Atomic functions. Each is also a point where another thread may run first; on global memory they are atomic among
// ranks (host threads) too.
#pragma once

#include <type_traits>

#include "simt/twin.h"

namespace simt {

template <class T>
using Word = std::conditional_t<sizeof(T) == 8, unsigned long long, std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>>;

template <class T, class F>
T exchange_word(T* address, F next) {
  auto* word = reinterpret_cast<Word<T>*>(address);
  Word<T> before = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &before, bits<Word<T>>(next(bits<T>(before))), true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED)) {
  }
  return bits<T>(before);
}

template <class T, class F>
SIMT_TWIN T atomic_update(const char* what, T* address, F next) {
  preempt();
  atomic(what, address, sizeof(T));
  return exchange_word(address, next);
}

}  // namespace simt

template <class T>
SIMT_TWIN T atomicAdd(T* p, T v) { return simt::atomic_update("atomicAdd", p, [v](T old) { return T(old + v); }); }
template <class T>
SIMT_TWIN T atomicSub(T* p, T v) { return simt::atomic_update("atomicSub", p, [v](T old) { return T(old - v); }); }
template <class T>
SIMT_TWIN T atomicMin(T* p, T v) { return simt::atomic_update("atomicMin", p, [v](T old) { return v < old ? v : old; }); }
template <class T>
SIMT_TWIN T atomicMax(T* p, T v) { return simt::atomic_update("atomicMax", p, [v](T old) { return old < v ? v : old; }); }
template <class T>
SIMT_TWIN T atomicAnd(T* p, T v) { return simt::atomic_update("atomicAnd", p, [v](T old) { return T(old & v); }); }
template <class T>
SIMT_TWIN T atomicOr(T* p, T v) { return simt::atomic_update("atomicOr", p, [v](T old) { return T(old | v); }); }
template <class T>
SIMT_TWIN T atomicExch(T* p, T v) { return simt::atomic_update("atomicExch", p, [v](T) { return v; }); }
template <class T>
SIMT_TWIN T atomicCAS(T* p, T compare, T v) {
  return simt::atomic_update("atomicCAS", p, [compare, v](T old) { return old == compare ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update("atomicInc", p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
