// Rows of activations to integers, for linears whose input no other op has quantised (an attention's output); rows that are
// turned by Hadamard matrices first, or only that.
#include <algorithm>

#include "cpu/common/thread_pool.h"
#include "cpu/hadamard.h"
#include "cpu/quantise_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kElementsPerWorker = 32768;  // a launch pays from about 5 us of work (6 elements/ns)

}  // namespace

void quantise(const QuantiseParams& p) {
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(p.rows, worker, num_workers);
    float* turned = p.hadamard ? static_cast<float*>(scratch(Scratch::kWorker, 4 * size_t(p.k))) : nullptr;
    with_element(p.dtype, [&](auto element) {
      using E = decltype(element);
      for (int64_t row = share.begin; row < share.end; ++row) {
        const auto* x = static_cast<const typename E::Storage*>(p.x) + row * p.x_row_stride;
        if (p.hadamard) hadamard_row<E>(x, p.k, turned);
        if (p.y != nullptr) {
          auto* y = static_cast<typename E::Storage*>(p.y) + row * p.y_row_stride;
          for (int64_t i = 0; i < p.k; i += 16) E::store(y + i, load(turned + i));
        } else if (p.hadamard) {
          quantise_row([&](int64_t i) { return load(turned + i); }, p.k, row_of(p.out, row, p.k));
        } else {
          quantise_row([&](int64_t i) { return E::load(x + i); }, p.k, row_of(p.out, row, p.k));
        }
      }
    });
  };
  parallel(int(std::min(p.rows * p.k / kElementsPerWorker + 1, p.rows)), body);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
