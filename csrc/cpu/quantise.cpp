// Rows of activations to int8, for linears whose input no other op has quantised (an attention's output).
#include <algorithm>

#include "cpu/common/thread_pool.h"
#include "cpu/quantise_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kElementsPerWorker = 32768;  // a launch pays from about 5 us of work (6 elements/ns)

}  // namespace

void quantise(const QuantiseParams& p) {
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(p.rows, worker, num_workers);
    with_element(p.x_dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t row = share.begin; row < share.end; ++row) {
        const auto* x = static_cast<const typename E::Storage*>(p.x) + row * p.x_row_stride;
        quantise_row([&](int64_t i) { return E::load(x + i); }, p.k, row_of(p.out, row, p.k));
      }
    });
  };
  parallel(int(std::min(p.rows * p.k / kElementsPerWorker + 1, p.rows)), body);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
