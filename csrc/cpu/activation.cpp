// Gated activations: out = act(gate) * up, the two halves of a row.
#include <algorithm>

#include "cpu/activate.h"
#include "cpu/common/thread_pool.h"
#include "cpu/quantise_row.h"
#include "tilestream/norm.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kElementsPerWorker = 16384;  // a launch pays from about 5 us of work (3 elements/ns)

template <class E, Activation A>
void act_rows(const ActAndMulParams& p, int64_t begin, int64_t end) {
  using T = typename E::Storage;
  float* values = static_cast<float*>(scratch(Scratch::kWorker, size_t(p.quantised.q != nullptr ? 4 * p.hidden : 0)));
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride;
    const T* up = gate + p.hidden;
    const auto gated = [&](int64_t k, int64_t num) {
      return mul(activate<A>(load_part<E>(gate + k, num)), load_part<E>(up + k, num));
    };
    if (p.quantised.q != nullptr) {  // hidden is a multiple of 32
      for (int64_t i = 0; i < p.hidden; i += kLanes) store(values + i, gated(i, kLanes));
      quantise_row([&](int64_t i) { return load(values + i); }, p.hidden, row_of(p.quantised, row, p.hidden));
      continue;
    }
    T* out = static_cast<T*>(p.out) + row * p.out_row_stride;
    int64_t i = 0;
    for (; i + 2 * kLanes <= p.hidden; i += 2 * kLanes)
      E::store_pair(out + i, gated(i, kLanes), gated(i + kLanes, kLanes));
    for (; i < p.hidden; i += kLanes) store_part<E>(out + i, gated(i, p.hidden - i), p.hidden - i);
  }
}

}  // namespace

void act_and_mul(const ActAndMulParams& p) {
  auto body = [&](int worker, int num_workers) {
    const Share share = share_of(p.num_tokens, worker, num_workers);
    with_element(p.dtype, [&](auto element) {
      using E = decltype(element);
      if (p.activation == Activation::kSilu) {
        act_rows<E, Activation::kSilu>(p, share.begin, share.end);
      } else {
        act_rows<E, Activation::kGeluTanh>(p, share.begin, share.end);
      }
    });
  };
  parallel(int(std::min(p.num_tokens * p.hidden / kElementsPerWorker + 1, p.num_tokens)), body);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
