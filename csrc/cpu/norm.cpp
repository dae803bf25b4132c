// RMS normalisation, with the residual addition and the quantisation for the next linear fused in.
//
// A row is read once from memory: the first pass adds the residual and sums squares, the second reads the row
// again from L1/L2 and writes the result (int8: twice, for the largest value and for the integers). Memory-bound: the
// roof is a copy of the same bytes.
// Squares are summed in 4 x 16 lanes in a fixed order, so a row's result depends on nothing but the row.
#include "tilestream/norm.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/thread_pool.h"
#include "cpu/quantise_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kChains = 4;  // independent sums: hides the latency of the addition
// A launch pays from about 5 us of work on one worker (measured: 25 elements/ns from L2).
constexpr int64_t kElementsPerWorker = 65536;

// Sum of squares of a row; with a residual, which becomes round(residual + x), of those rounded values.
template <class E, bool kResidual>
float sum_squares(const typename E::Storage* x, typename E::Storage* residual, int64_t hidden) {
  F32x16 sums[kChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kChains * kLanes <= hidden; i += kChains * kLanes) {
    if constexpr (kResidual) {
      for (int64_t j = i; j < i + kChains * kLanes; j += 2 * kLanes) {
        E::store_pair(residual + j, add(E::load(x + j), E::load(residual + j)),
                      add(E::load(x + j + kLanes), E::load(residual + j + kLanes)));
      }
    }
    for (int c = 0; c < kChains; ++c) {
      const F32x16 v = E::load((kResidual ? residual : x) + i + c * kLanes);
      sums[c] = fma(v, v, sums[c]);
    }
  }
  for (int c = 0; i < hidden; i += kLanes, ++c) {
    const int64_t num = hidden - i;
    if constexpr (kResidual)
      store_part<E>(residual + i, add(load_part<E>(x + i, num), load_part<E>(residual + i, num)), num);
    const F32x16 v = load_part<E>((kResidual ? residual : x) + i, num);
    sums[c] = fma(v, v, sums[c]);
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class E>
void scale_row(const typename E::Storage* x, const float* weight, typename E::Storage* out, int64_t hidden,
               float inverse) {
  const F32x16 scale = set1(inverse);
  const auto scaled = [&](int64_t i) { return mul(mul(E::load(x + i), scale), load(weight + i)); };
  int64_t i = 0;
  for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) E::store_pair(out + i, scaled(i), scaled(i + kLanes));
  for (; i < hidden; i += kLanes) {
    const int64_t num = std::min(hidden - i, kLanes);
    store_part<E>(out + i, mul(mul(load_part<E>(x + i, num), scale), load_first(weight + i, int(num))), num);
  }
}

template <class E>
void quantise_scaled_row(const typename E::Storage* x, const float* weight, int64_t hidden, float inverse,
                         const QuantisedRows& out) {
  const F32x16 scale = set1(inverse);
  quantise_row([&](int64_t i) { return mul(mul(E::load(x + i), scale), load(weight + i)); }, hidden, out);
}

template <class E>
void norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  using T = typename E::Storage;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t o = row / p.inner, i = row % p.inner;
    const T* x = static_cast<const T*>(p.x) + o * p.x_outer_stride + i * p.x_inner_stride;
    T* residual = static_cast<T*>(p.residual);
    if (residual != nullptr) residual += o * p.residual_outer_stride + i * p.residual_inner_stride;
    const float squares = residual != nullptr ? sum_squares<E, true>(x, residual, p.hidden)
                                              : sum_squares<E, false>(x, nullptr, p.hidden);
    const float inverse = 1.0f / std::sqrt(squares / float(p.hidden) + p.eps);
    const T* sum_row = residual != nullptr ? residual : x;
    if (p.quantised.q != nullptr) {
      quantise_scaled_row<E>(sum_row, p.weight, p.hidden, inverse, row_of(p.quantised, row, p.hidden));
    } else {
      T* out = static_cast<T*>(p.out) + o * p.out_outer_stride + i * p.out_inner_stride;
      scale_row<E>(sum_row, p.weight, out, p.hidden, inverse);
    }
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const int64_t rows = p.outer * p.inner;
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(rows, worker, num_workers);
    with_element(p.dtype, [&](auto element) { norm_rows<decltype(element)>(p, share.begin, share.end); });
  };
  parallel(int(std::min<int64_t>(rows * p.hidden / kElementsPerWorker + 1, rows)), body);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
