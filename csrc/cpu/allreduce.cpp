// All-reduce between processes that share memory, with residual addition, RMS norm and quantisation fused in.
//
// A token's owner reads its row from every rank's memory once, and writes the result over them while these lines are still in
// its cache; nobody else touches the row between the two barriers. So the bytes that move are those of a plain all-reduce, and
// of the residual, of which each row has one owner.
#include "tilestream/allreduce.h"

#include "cpu/common/rank_signals.h"
#include "cpu/common/thread_pool.h"
#include "cpu/norm_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// A launch pays from about 5 us of work on one worker.
constexpr int64_t kElementsPerWorker = 32768;

// `count` elements of T at `offset` of this rank's block, to the same place of all others.
template <class T>
void send(const Ranks& ranks, const T* from, int64_t count) {
  const int64_t offset = reinterpret_cast<const unsigned char*>(from) - ranks.memory[ranks.rank];
  for (int r = 0; r < ranks.world_size; ++r) {
    if (r != ranks.rank) std::memcpy(ranks.memory[r] + offset, from, size_t(count) * sizeof(T));
  }
}

// This rank's own array at `offset`.
template <class T>
T* at(const Ranks& ranks, int64_t offset) {
  return reinterpret_cast<T*>(ranks.memory[ranks.rank] + offset);
}

// The row is in this rank's memory as the sum's owner wants it: normalised, as floats or as integers, and sent to all.
template <class E, class Values>
void store_row(const AllReduceRmsNormParams& p, int64_t token, const Values& values) {
  const Ranks& ranks = p.ranks;
  if (p.q < 0) {
    auto* const x = at<typename E::Storage>(ranks, p.x) + token * p.hidden;
    store_values<E>(values, 0, p.hidden, x);
    return send(ranks, x, p.hidden);
  }
  const QuantisedRows all{at<int8_t>(ranks, p.q), at<float>(ranks, p.scale), at<int32_t>(ranks, p.sum), p.k4};
  const QuantisedRows row = row_of(all, token, p.hidden);
  quantise_row([&](int64_t i) { return values(i, kLanes); }, p.hidden, row);
  send(ranks, row.q, row.row_bytes(p.hidden));
  send(ranks, row.scale, ceil_div(p.hidden, kScaleK));
  send(ranks, row.sum, p.hidden / kGroupK);
}

template <class E>
void reduce_tokens(const AllReduceRmsNormParams& p, int64_t begin, int64_t end) {
  using T = typename E::Storage;
  for (int64_t token = begin; token < end; ++token) {
    const T* x[kMaxRanks];
    for (int r = 0; r < p.ranks.world_size; ++r) x[r] = reinterpret_cast<const T*>(p.ranks.memory[r] + p.x) + token * p.hidden;
    const auto sum = [&](int64_t i, int64_t num) {
      F32x16 total = load_part<E>(x[0] + i, num);
      for (int r = 1; r < p.ranks.world_size; ++r) total = add(total, load_part<E>(x[r] + i, num));
      return total;
    };
    if (p.weight == nullptr) {
      store_row<E>(p, token, sum);
    } else if (p.residual != nullptr) {
      T* const residual = static_cast<T*>(p.residual) + token * p.residual_row_stride;
      const auto total = [&](int64_t i, int64_t num) { return add(sum(i, num), load_part<E>(residual + i, num)); };
      const float squares = store_and_sum_squares<E>(total, p.hidden, residual);
      store_row<E>(p, token, scaled<E>(residual, p.weight, inverse_norm(squares, p.hidden, p.eps)));
    } else {
      auto* const row = static_cast<float*>(scratch(Scratch::kWorker, size_t(p.hidden) * sizeof(float)));
      const float squares = store_and_sum_squares<Float32>(sum, p.hidden, row);
      store_row<E>(p, token, scaled<Float32>(row, p.weight, inverse_norm(squares, p.hidden, p.eps)));
    }
  }
}

}  // namespace

void allreduce_rmsnorm(const AllReduceRmsNormParams& p) {
  if (p.num_tokens == 0) return;
  const Ranks& ranks = p.ranks;
  const TokenRange mine = tokens_of(p.num_tokens, ranks.rank, ranks.world_size);
  const uint32_t call = next_call(ranks);
  signal(ranks, Milestone::kArrived, call);
  if (mine.begin < mine.end) {
    await(ranks, Milestone::kArrived, call, ranks.world_size);
    const int64_t num = mine.end - mine.begin;
    auto body = [&](int worker, int num_workers) {
      const Share share = share_of(num, worker, num_workers);
      with_element(p.dtype, [&](auto element) {
        reduce_tokens<decltype(element)>(p, mine.begin + share.begin, mine.begin + share.end);
      });
    };
    parallel(int(std::min<int64_t>(num * p.hidden * ranks.world_size / kElementsPerWorker + 1, num)), body);
    signal(ranks, Milestone::kDone, call);
  }
  const int num_owners = int(ceil_div(p.num_tokens, ceil_div(p.num_tokens, ranks.world_size)));
  await(ranks, Milestone::kDone, call, num_owners);
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
