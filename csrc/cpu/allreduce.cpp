// All-reduce between processes that share memory, with residual addition, RMS norm and quantisation fused in.
//
// A token's owner reads its row from every rank's memory once, and writes the result over them while these lines are still in
// its cache; nobody else touches the row between the two barriers. So the bytes that move are those of a plain all-reduce and
// of the residual, of which each row has one owner.
// Fetching the next row during the second pass (into L1 or L2, also for writing) and going backwards in it were measured: no
// faster.
#include "tilestream/allreduce.h"

#include "cpu/common/rank_signals.h"
#include "cpu/common/thread_pool.h"
#include "cpu/norm_row.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

// A launch pays from about 5 us of work on one worker.
constexpr int64_t kElementsPerWorker = 32768;

// A token's rows, of all ranks.
template <class T>
struct Rows {
  T* x[kMaxRanks];
  T* residual;
  int num;
};

template <class T>
Rows<T> rows_of(const AllReduceRmsNormParams& p, int64_t token) {
  Rows<T> rows{{}, nullptr, p.ranks.world_size};
  for (int r = 0; r < rows.num; ++r) rows.x[r] = reinterpret_cast<T*>(p.ranks.memory[r] + p.x) + token * p.hidden;
  if (p.residual != nullptr) rows.residual = static_cast<T*>(p.residual) + token * p.residual_row_stride;
  return rows;
}

// As floats, into x.
template <class E, class Values>
void store_to_all(const Rows<typename E::Storage>& rows, int64_t hidden, const Values& values) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) {
    const F32x16 lo = values(i, kLanes), hi = values(i + kLanes, kLanes);
    for (int r = 0; r < rows.num; ++r) E::store_pair(rows.x[r] + i, lo, hi);
  }
  for (; i < hidden; i += kLanes) {
    const int64_t num = std::min(hidden - i, kLanes);
    const F32x16 part = values(i, num);
    for (int r = 0; r < rows.num; ++r) store_part<E>(rows.x[r] + i, part, num);
  }
}

// As integers: first into this rank's memory, then to the same place of the others.
template <class Values>
void quantise_to_all(const AllReduceRmsNormParams& p, int64_t token, const Values& values) {
  unsigned char* const own = p.ranks.memory[p.ranks.rank];
  const QuantisedRows all{reinterpret_cast<int8_t*>(own + p.q), reinterpret_cast<float*>(own + p.scale),
                          reinterpret_cast<int32_t*>(own + p.sum), p.k4};
  const QuantisedRows row = row_of(all, token, p.hidden);
  quantise_row([&](int64_t i) { return values(i, kLanes); }, p.hidden, row);
  const auto send = [&](const void* from, int64_t num_bytes) {
    const int64_t offset = static_cast<const unsigned char*>(from) - own;
    for (int r = 0; r < p.ranks.world_size; ++r) {
      if (r != p.ranks.rank) std::memcpy(p.ranks.memory[r] + offset, from, size_t(num_bytes));
    }
  };
  send(row.q, row.row_bytes(p.hidden));
  send(row.scale, 4 * ceil_div(p.hidden, kScaleK));
  send(row.sum, 4 * (p.hidden / kGroupK));
}

template <class E>
void reduce_tokens(const AllReduceRmsNormParams& p, int64_t begin, int64_t end) {
  using T = typename E::Storage;
  for (int64_t token = begin; token < end; ++token) {
    const Rows<T> rows = rows_of<T>(p, token);
    const auto sum = [&](int64_t i, int64_t num) {
      F32x16 total = load_part<E>(rows.x[0] + i, num);
      for (int r = 1; r < rows.num; ++r) total = add(total, load_part<E>(rows.x[r] + i, num));
      return total;
    };
    const auto finish = [&](const auto& values) {
      if (p.q < 0) return store_to_all<E>(rows, p.hidden, values);
      quantise_to_all(p, token, values);
    };
    if (p.weight == nullptr) {
      store_to_all<E>(rows, p.hidden, sum);
    } else if (p.residual != nullptr) {
      const auto total = [&](int64_t i, int64_t num) { return add(sum(i, num), load_part<E>(rows.residual + i, num)); };
      const float squares = store_and_sum_squares<E>(total, p.hidden, rows.residual);
      finish(scaled<E>(rows.residual, p.weight, inverse_norm(squares, p.hidden, p.eps)));
    } else {
      auto* const row = static_cast<float*>(scratch(Scratch::kWorker, size_t(p.hidden) * sizeof(float)));
      const float squares = store_and_sum_squares<Float32>(sum, p.hidden, row);
      finish(scaled<Float32>(row, p.weight, inverse_norm(squares, p.hidden, p.eps)));
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
