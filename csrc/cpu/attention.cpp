// Paged attention from a plan (contract: tilestream/attention.h).
//
// Every worker runs its jobs; then the partial results are merged. A job packs its tokens' q heads of one kv
// head into rows, walks its keys in tiles of 128 (borders at multiples of 128, whatever the plan's tiles), and passes
// groups of up to kMaxRows rows over each tile: scores = q . K^T, one online-softmax step, out = alpha * out + P . V.
// A tile of K and V (32 KB at head_dim 64 in bfloat16) stays in L1/L2 while the groups pass over it; q, out and the
// running max and sum of a job stay in L2.
// Arithmetic: bfloat16 and float8 caches round q and the weights to bfloat16; other float caches compute in float32;
// int8 and int4 caches in exact integers (attention_digits.h), under a float32 q as floats. Sums are float32. Decode is
// bound by reading K and V, prefill by the multiply-adds.
// A row's bits depend on its own q, its job's keys and its mask, and on nothing else.
// Source: FlashAttention-2 (2307.08691), online softmax (1805.02867).
#include "tilestream/attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/attention_blocks.h"
#include "cpu/attention_digits.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_tile.h"
#include "cpu/common/thread_pool.h"
#include "cpu/elements.h"

namespace tilestream::cpu::TILESTREAM_LEVEL {
namespace {

constexpr float kLn2 = 0.693147180559945309f;

inline float exp2_of(float x) {
  float lanes[16];
  store(lanes, exp2(set1(x)));
  return lanes[0];
}

// What all jobs of a launch share.
struct Launch {
  const AttentionParams& p;
  int group_size;
  float q_sign;  // sign of sm_scale, folded into q so that LogitRule::scale is positive
  LogitRule rule;
};

Launch make_launch(const AttentionParams& p) {
  const PlanHeader& h = p.plan.header();
  const float magnitude = std::fabs(p.sm_scale);
  LogitRule rule{magnitude * kLog2E, 0.0f, p.alibi_slopes != nullptr};
  if (p.logits_soft_cap > 0.0f) rule = {p.logits_soft_cap * kLog2E, magnitude / p.logits_soft_cap, rule.alibi};
  if (magnitude == 0.0f) rule = {kLog2E, 0.0f, rule.alibi};  // q is multiplied by 0
  return {p, h.num_qo_heads / h.num_kv_heads, float(p.sm_scale > 0) - float(p.sm_scale < 0), rule};
}

// out and lse of one (token, q head) from its parts, in order: part(i, out, lse_log2) gives part i's normalised output
// and lse. One part alone is written as it is, bit for bit. sum: [head_dim_vo] floats of room.
template <class Part>
void write_merged(const Launch& launch, int token, int head, int num_parts, Part&& part, float* sum) {
  const AttentionParams& p = launch.p;
  const float sink = p.sinks != nullptr ? p.sinks[head] * kLog2E : -__builtin_inff();
  float max_log2 = sink, denominator = 0.0f;
  const float* values;
  float lse_log2;
  for (int i = 0; i < num_parts; ++i) {
    part(i, values, lse_log2);
    max_log2 = lse_log2 > max_log2 || lse_log2 != lse_log2 ? lse_log2 : max_log2;
  }
  for (int d = 0; d < p.head_dim_vo; d += 16) store(sum + d, zero());
  const float empty = -__builtin_inff();
  if (sink != empty) denominator = exp2_of(sink - max_log2);
  for (int i = 0; i < num_parts; ++i) {
    part(i, values, lse_log2);
    if (lse_log2 == empty) continue;
    const float weight = exp2_of(lse_log2 - max_log2);
    denominator += weight;
    for (int d = 0; d < p.head_dim_vo; d += 16) store(sum + d, fma(load(values + d), set1(weight), load(sum + d)));
  }
  const F32x16 divisor = set1(denominator == 0.0f ? 1.0f : denominator / p.out_scale(head / launch.group_size));
  with_element(p.out_dtype, [&](auto element) {
    using E = decltype(element);
    auto* out = static_cast<typename E::Storage*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int d = 0; d < p.head_dim_vo; d += 16) E::store(out + d, div(load(sum + d), divisor));
  });
  if (p.lse != nullptr) {
    const float lse = denominator == 0.0f ? empty : (max_log2 + std::log2(denominator)) * kLn2;
    p.lse[int64_t(token) * p.plan.header().num_qo_heads + head] = lse;
  }
}

// A worker's memory for one job.
struct JobMemory {
  uint32_t* q;                         // [rows][digits][q_units]
  float *q_factor, *q_sum;             // [rows]: quantised caches only
  SoftmaxState state;
  float* out;                          // [rows][head_dim_vo], not yet normalised
  float *scores, *alpha;               // of one group: [kMaxRows][kTileKeys], [16]
  float *weight_factor, *weight_sum;   // [kMaxRows]: quantised caches only
  uint32_t* weights;                   // [kMaxRows][digits][units of kTileKeys tokens]
  float* row;                          // [head_dim_qk or head_dim_vo]
  TileScales* scales;
  char* pack;
};

class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t num) {
    T* at = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(num * int64_t(sizeof(T)), 64);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class C>
JobMemory carve(Carver& carver, const Launch& launch, int64_t rows) {
  const AttentionParams& p = launch.p;
  JobMemory m;
  m.q = carver.take<uint32_t>(rows * C::kDigits * num_units<C>(p.head_dim_qk));
  m.q_factor = carver.take<float>(rows);
  m.q_sum = carver.take<float>(rows);
  m.state = {carver.take<float>(rows), carver.take<float>(rows * 16)};
  m.out = carver.take<float>(rows * p.head_dim_vo);
  m.scores = carver.take<float>(kMaxRows<C> * kTileKeys);
  m.alpha = carver.take<float>(16);
  m.weight_factor = carver.take<float>(kMaxRows<C>);
  m.weight_sum = carver.take<float>(kMaxRows<C>);
  m.weights = carver.take<uint32_t>(kMaxRows<C> * C::kDigits * num_units<C>(kTileKeys));
  m.row = carver.take<float>(std::max(p.head_dim_qk, p.head_dim_vo));
  m.scales = carver.take<TileScales>(1);
  m.pack = carver.take<char>(kTileBlocks * TileReader<C>::block_bytes(p));
  return m;
}

template <class C>
class JobRunner {
 public:
  JobRunner(const Launch& launch, const PlanJob& job)
      : launch_(launch),
        p_(launch.p),
        job_(job),
        tokens_(p_.plan.q_rows() + job.q_rows_begin),
        num_rows_(job.num_q_tokens * launch.group_size),
        units_(num_units<C>(p_.head_dim_qk)) {
    Carver size(nullptr);
    carve<C>(size, launch, num_rows_);
    Carver memory(static_cast<char*>(scratch(Scratch::kWorker, size_t(size.used()))));
    m_ = carve<C>(memory, launch, num_rows_);
  }

  void run() {
    load_q();
    std::fill(m_.state.max, m_.state.max + num_rows_, -__builtin_inff());
    std::memset(m_.state.sum, 0, sizeof(float) * 16 * num_rows_);
    std::memset(m_.out, 0, sizeof(float) * num_rows_ * p_.head_dim_vo);
    walk_tiles();
    write_rows();
  }

 private:
  int token_of(int row) const { return row / launch_.group_size; }
  int head_of(int row) const { return job_.kv_head * launch_.group_size + row % launch_.group_size; }

  void load_q() {
    const F32x16 factor = set1(launch_.q_sign * p_.score_descale(job_.kv_head));
    for (int r = 0; r < num_rows_; ++r) {
      const auto load_row = [&](auto element) {
        using E = decltype(element);
        const auto* q = static_cast<const typename E::Storage*>(p_.q) + tokens_[token_of(r)] * p_.q_token_stride +
                        head_of(r) * p_.q_head_stride;
        for (int d = 0; d < p_.head_dim_qk; d += 16) store(m_.row + d, mul(E::load(q + d), factor));
      };
      if (p_.q_dtype == DType::kFloat8E4M3) load_row(Float8{});
      else with_element(p_.q_dtype, load_row);
      store_q_row(r);
    }
  }

  void store_q_row(int r) {
    const int num = p_.head_dim_qk;
    uint32_t* q = m_.q + int64_t(r) * C::kDigits * units_;
    if constexpr (C::kQuantised) {
      F32x16 sum = zero();
      for (int d = 0; d < num; d += 16) sum = add(sum, load(m_.row + d));
      m_.q_sum[r] = reduce_add(sum);
      m_.q_factor[r] = 1.0f;
    }
    if constexpr (C::kDigits == 2) {
      m_.q_factor[r] = to_digits(m_.row, num, q);
    } else if constexpr (C::kUnit == 2) {
      for (int d = 0; d < num; d += 16) store_bf16(reinterpret_cast<uint16_t*>(q) + d, load(m_.row + d));
    } else {
      std::memcpy(q, m_.row, sizeof(float) * num);
    }
  }

  void walk_tiles() {
    const TileReader<C> reader(p_, job_, m_.pack);
    const int groups = int(ceil_div(num_rows_, kMaxRows<C>));
    TileBlocks tile, next;
    // What is prefetched in place of blocks that are not the job's.
    std::fill(next.k, next.k + kTileBlocks, static_cast<const char*>(p_.k_cache));
    std::fill(next.v, next.v + kTileBlocks, static_cast<const char*>(p_.v_cache));
    int begin = job_.kv_begin / kTileKeys * kTileKeys;
    if (begin < job_.kv_end) reader.locate(begin, next);
    for (; begin < job_.kv_end; begin += kTileKeys) {
      tile = next;
      if (begin + kTileKeys < job_.kv_end) reader.locate(begin + kTileKeys, next);
      if constexpr (C::kQuantised) reader.read_scales(begin, tile, *m_.scales);
      reader.prepare(begin, tile);
      for (int g = 0; g < groups; ++g) {
        const int row_begin = num_rows_ * g / groups, row_end = num_rows_ * (g + 1) / groups;
        attend(begin, tile, next, row_begin, row_end - row_begin);
      }
    }
  }

  // The keys of the tile that row r sees.
  RowView view_of(int tile_begin, int r) const {
    const PlanHeader& h = p_.plan.header();
    int lo = job_.kv_begin, hi = job_.kv_end;
    float slope = 0.0f, first_distance = 0.0f;
    if (job_.q_pos_begin != kAllVisible) {
      const int q_pos = job_.q_pos_begin + token_of(r);
      if (h.causal) hi = std::min(hi, q_pos + 1);
      if (h.window_left >= 0) lo = std::max(lo, q_pos - h.window_left);
      if (p_.alibi_slopes != nullptr) {
        slope = p_.alibi_slopes[head_of(r)] * kLog2E;
        first_distance = float(tile_begin - q_pos);
      }
    }
    lo = std::min(std::max(lo - tile_begin, 0), kTileKeys);
    hi = std::min(std::max(hi - tile_begin, 0), kTileKeys);
    return {lo, hi, slope, first_distance};
  }

  // One group of rows over one tile.
  void attend(int tile_begin, const TileBlocks& tile, const TileBlocks& next, int row_begin, int rows) {
    RowView views[kMaxRows<C>];
    int lo = kTileKeys, hi = 0;
    for (int r = 0; r < rows; ++r) {
      views[r] = view_of(tile_begin, row_begin + r);
      if (views[r].lo < views[r].hi) lo = std::min(lo, views[r].lo), hi = std::max(hi, views[r].hi);
    }
    if (lo >= hi) return;
    const int block_begin = lo / kKvBlockTokens, block_end = int(ceil_div(hi, kKvBlockTokens));
    tile_scores<C>(rows, m_.q + int64_t(row_begin) * C::kDigits * units_, units_, tile, next, block_begin, block_end,
                   *m_.scales, RowScales{m_.q_factor + row_begin, m_.q_sum + row_begin}, m_.scores);
    softmax_step<C>(rows, m_.scores, launch_.rule, views,
                    {m_.state.max + row_begin, m_.state.sum + 16 * int64_t(row_begin)}, m_.alpha, m_.weights);
    if constexpr (C::kQuantised) {
      for (int r = 0; r < rows; ++r) {
        float* weights = m_.scores + r * kTileKeys;
        m_.weight_sum[r] = scale_weights(weights, *m_.scales);
        m_.weight_factor[r] = 1.0f;
        if constexpr (C::kDigits == 2) {
          m_.weight_factor[r] = to_digits(weights, kTileKeys, m_.weights + r * 2 * num_units<C>(kTileKeys));
        }
      }
    }
    const bool in_place = C::kUnit == 1;
    tile_values<C>(rows, in_place ? reinterpret_cast<const uint32_t*>(m_.scores) : m_.weights, tile, next, block_begin,
                   block_end, p_.head_dim_vo, m_.alpha, RowScales{m_.weight_factor, m_.weight_sum},
                   m_.out + int64_t(row_begin) * p_.head_dim_vo);
  }

  // Normalised rows and their lse: to the workspace, or as the final output.
  void write_rows() {
    const int group_size = launch_.group_size, head_dim = p_.head_dim_vo;
    const int64_t lse_begin = int64_t(p_.plan.header().num_partial_rows) * group_size * head_dim;
    for (int r = 0; r < num_rows_; ++r) {
      const float sum = reduce_add(load(m_.state.sum + 16 * int64_t(r)));
      const float lse_log2 = sum == 0.0f ? -__builtin_inff() : m_.state.max[r] * launch_.rule.to_log2() + std::log2(sum);
      float* out = m_.out + int64_t(r) * head_dim;
      float* to = out;
      if (job_.partial_begin >= 0) {
        const int64_t row = int64_t(job_.partial_begin) * group_size + r;
        to = p_.workspace + row * head_dim;
        p_.workspace[lse_begin + row] = lse_log2;
      }
      const F32x16 divisor = set1(sum == 0.0f ? 1.0f : sum);
      for (int d = 0; d < head_dim; d += 16) store(to + d, div(load(out + d), divisor));
      if (job_.partial_begin >= 0) continue;
      const auto part = [&](int, const float*& values, float& lse) { values = out, lse = lse_log2; };
      write_merged(launch_, tokens_[token_of(r)], head_of(r), 1, part, m_.row);
    }
  }

  const Launch& launch_;
  const AttentionParams& p_;
  const PlanJob& job_;
  const int32_t* tokens_;
  const int num_rows_, units_;
  JobMemory m_;
};

constexpr int kMergesPerWorker = 16;  // about 2 us of work: what another worker's start costs

void merge(const Launch& launch, const PlanMerge& merge) {
  const AttentionParams& p = launch.p;
  const int group_size = launch.group_size;
  const float* lse = p.workspace + int64_t(p.plan.header().num_partial_rows) * group_size * p.head_dim_vo;
  const int32_t* parts = p.plan.merge_parts() + merge.parts_begin;
  float* sum = static_cast<float*>(scratch(Scratch::kWorker, sizeof(float) * size_t(p.head_dim_vo)));
  for (int g = 0; g < group_size; ++g) {
    const auto part = [&](int i, const float*& values, float& lse_log2) {
      const int64_t row = int64_t(parts[i]) * group_size + g;
      values = p.workspace + row * p.head_dim_vo;
      lse_log2 = lse[row];
    };
    write_merged(launch, merge.token, merge.kv_head * group_size + g, merge.num_parts, part, sum);
  }
}

template <class C>
void run_launch(const AttentionParams& p) {
  const PlanHeader& h = p.plan.header();
  const Launch launch = make_launch(p);
  auto body = [&](int worker, int num_workers) {
    for (int w = worker; w < h.num_workers; w += num_workers) {
      for (int j = p.plan.worker_begin()[w]; j < p.plan.worker_begin()[w + 1]; ++j) {
        JobRunner<C>(launch, p.plan.jobs()[j]).run();
      }
    }
  };
  parallel(h.num_workers, body);
  auto merges = [&](int worker, int num_workers) {
    const Share share = share_of(h.num_merges, worker, num_workers);
    for (long i = share.begin; i < share.end; ++i) merge(launch, p.plan.merges()[i]);
  };
  parallel(int(ceil_div(h.num_merges, kMergesPerWorker)), merges);
}

}  // namespace

void attention(const AttentionParams& p) {
  const bool float32_q = p.q_dtype == DType::kFloat32;
  switch (p.kv_dtype) {
    case DType::kFloat32: return run_launch<Float32Cache>(p);
    case DType::kFloat16: return run_launch<Float16Cache>(p);
    case DType::kBFloat16: return run_launch<BFloat16Cache>(p);
    case DType::kFloat8E4M3: return run_launch<Float8Cache>(p);
    case DType::kUInt8: return float32_q ? run_launch<FloatInt8Cache>(p) : run_launch<Int8Cache>(p);
    case DType::kUInt4: return float32_q ? run_launch<FloatInt4Cache>(p) : run_launch<Int4Cache>(p);
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
