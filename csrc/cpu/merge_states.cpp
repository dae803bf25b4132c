// Merge of attention states over disjoint key sets, in the order of the states. Bound by reading v once.
#include <algorithm>
#include <cmath>

#include "cpu/common/thread_pool.h"
#include "cpu/elements.h"
#include "tilestream/attention.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// A launch pays from about 5 us of work on one worker (measured: about 4 values in 1 ns from L2).
constexpr int64_t kValuesPerWorker = 16384;
constexpr int64_t kChunkValues = 256;  // of head_dim, summed at a time

// One (token, head). Empty states are skipped, so that their v is never read; a lone state comes out bit for bit.
template <class E>
void merge_row(const MergeStatesParams& p, int64_t token, int64_t head) {
  using T = typename E::Storage;
  const int64_t first = token * p.num_states * p.num_heads + head;
  const float empty = -__builtin_inff();
  float most = empty;
  for (int s = 0; s < p.num_states; ++s) {
    const float lse = p.lse[first + int64_t(s) * p.num_heads];
    most = lse > most || lse != lse ? lse : most;
  }
  const int64_t row = token * p.num_heads + head;
  float denominator = 0.0f;
  for (int64_t begin = 0; begin < p.head_dim; begin += kChunkValues) {
    const int64_t num = std::min<int64_t>(kChunkValues, p.head_dim - begin);
    float sum[kChunkValues];
    for (int64_t d = 0; d < num; d += 16) store(sum + d, zero());
    denominator = 0.0f;  // the same for every chunk
    for (int s = 0; s < p.num_states; ++s) {
      const int64_t state = first + int64_t(s) * p.num_heads;
      if (p.lse[state] == empty) continue;
      const float scale = std::exp(p.lse[state] - most);
      const F32x16 weight = set1(scale);
      denominator += scale;
      const T* v = static_cast<const T*>(p.v) + state * p.head_dim + begin;
      for (int64_t d = 0; d < num; d += 16) store(sum + d, fma(load_part<E>(v + d, num - d), weight, load(sum + d)));
    }
    const F32x16 divisor = set1(denominator == 0.0f ? 1.0f : denominator);
    T* out = static_cast<T*>(p.out) + row * p.head_dim + begin;
    for (int64_t d = 0; d < num; d += 16) store_part<E>(out + d, div(load(sum + d), divisor), num - d);
  }
  p.out_lse[row] = denominator == 0.0f ? empty : most + std::log(denominator);
}

}  // namespace

void merge_states(const MergeStatesParams& p) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t num_rows = p.num_tokens * p.num_heads;
    auto body = [&](int worker, int num_workers) {
      const Share share = share_of(num_rows, worker, num_workers);
      for (int64_t i = share.begin; i < share.end; ++i) merge_row<E>(p, i / p.num_heads, i % p.num_heads);
    };
    const int64_t values = num_rows * p.head_dim * p.num_states;
    parallel(int(std::min<int64_t>(ceil_div(values, kValuesPerWorker), 1 << 16)), body);
  });
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
