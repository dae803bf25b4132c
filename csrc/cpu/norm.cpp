// RMS normalisation, with the residual addition and the quantisation for the next linear fused in.
//
// A row is read once from memory: the first pass adds the residual and sums squares, the second reads the row
// again from L1/L2 and writes the result (int8: twice, for the largest value and for the integers). Memory-bound: the
// roof is a copy of the same bytes.
#include "tilestream/norm.h"

#include <algorithm>

#include "cpu/common/thread_pool.h"
#include "cpu/norm_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// A launch pays from about 5 us of work on one worker (measured: 25 elements/ns from L2).
constexpr int64_t kElementsPerWorker = 65536;

template <class E>
void norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  using T = typename E::Storage;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t o = row / p.inner, i = row % p.inner;
    const T* x = static_cast<const T*>(p.x) + o * p.x_outer_stride + i * p.x_inner_stride;
    T* residual = static_cast<T*>(p.residual);
    if (residual != nullptr) residual += o * p.residual_outer_stride + i * p.residual_inner_stride;
    const auto sum = [&](int64_t i, int64_t num) { return add(load_part<E>(x + i, num), load_part<E>(residual + i, num)); };
    const auto as_it_is = [](int64_t, int64_t) {};
    const float squares = residual != nullptr ? store_and_sum_squares<E>(sum, p.hidden, residual)
                                              : sum_squares<E>(x, p.hidden, as_it_is);
    const auto values = scaled<E>(residual != nullptr ? residual : x, p.weight, inverse_norm(squares, p.hidden, p.eps));
    if (p.quantised.q != nullptr) {
      quantise_row([&](int64_t i) { return values(i, kLanes); }, p.hidden, row_of(p.quantised, row, p.hidden));
    } else {
      store_values<E>(values, 0, p.hidden, static_cast<T*>(p.out) + o * p.out_outer_stride + i * p.out_inner_stride);
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
