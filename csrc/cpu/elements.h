// Tensor elements as floats: one struct per dtype, so that a kernel is a template over it. load and store
// take 16 elements, store_pair 32.
#pragma once

#include "cpu/simd/vec.h"
#include "tilestream/types.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {

struct Float32 {
  using Storage = float;
  static F32x16 load(const float* p) { return TILESTREAM_LEVEL::load(p); }
  static void store(float* p, F32x16 a) { TILESTREAM_LEVEL::store(p, a); }
  static void store_pair(float* p, F32x16 lo, F32x16 hi) { store(p, lo), store(p + 16, hi); }
};
struct Float16 {
  using Storage = uint16_t;
  static F32x16 load(const uint16_t* p) { return load_f16(p); }
  static void store(uint16_t* p, F32x16 a) { store_f16(p, a); }
  static void store_pair(uint16_t* p, F32x16 lo, F32x16 hi) { store(p, lo), store(p + 16, hi); }
};
struct BFloat16 {
  using Storage = uint16_t;
  static F32x16 load(const uint16_t* p) { return load_bf16(p); }
  static void store(uint16_t* p, F32x16 a) { store_bf16(p, a); }
  // One instruction where the level has it; that one writes denormals as 0.
  static void store_pair(uint16_t* p, F32x16 lo, F32x16 hi) { store_bf16x32(p, cvt_bf16x32(lo, hi)); }
};

struct Float8 {  // e4m3
  using Storage = uint8_t;
  static F32x16 load(const uint8_t* p) { return load_e4m3(p); }
};

// The first n (0..16) elements; the other lanes are 0 and their memory is neither read nor written.
template <class E>
inline F32x16 load_part(const typename E::Storage* p, int64_t n) {
  if (n >= 16) return E::load(p);
  typename E::Storage lanes[16] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return E::load(lanes);
}
template <class E>
inline void store_part(typename E::Storage* p, F32x16 a, int64_t n) {
  if (n >= 16) return E::store(p, a);
  typename E::Storage lanes[16];
  E::store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// f(Element{}) for a tensor of `dtype`.
template <class Fn>
inline void with_element(DType dtype, Fn&& f) {
  switch (dtype) {
    case DType::kFloat16: return f(Float16{});
    case DType::kBFloat16: return f(BFloat16{});
    default: return f(Float32{});
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
