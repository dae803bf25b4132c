// Paged attention from a plan (contract: tilestream/attention.h).
//
// Every worker runs its jobs; then the partial results are merged. A job packs its tokens' q heads of one kv
// head into rows, walks its keys in tiles of 128 (borders at multiples of 128, whatever the plan's tiles), and passes
// groups of up to kMaxRows rows over each tile: scores = q . K^T, one online-softmax step, out = alpha * out + P . V.
// A tile of K and V (32 KB at head_dim 64 in bfloat16) stays in L1/L2 while the groups pass over it; q, out and the
// running max and sum of a job stay in L2.
// Arithmetic: bfloat16 caches round q and the weights to bfloat16; float caches compute in float32; int8 and int4
// caches in exact integers (attention_digits.h). Sums are float32. Decode is bound by reading K and V, prefill by the
// multiply-adds.
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
  int group_size, num_digits;  // num_digits: rows of the product per row of q; 1 for float products
  float q_sign;                // sign of sm_scale, folded into q so that LogitRule::scale is positive
  LogitRule rule;
};

Launch make_launch(const AttentionParams& p, int num_digits) {
  const PlanHeader& h = p.plan.header();
  const float magnitude = std::fabs(p.sm_scale);
  LogitRule rule{magnitude * kLog2E, 0.0f, p.alibi_slopes != nullptr};
  if (p.logits_soft_cap > 0.0f) rule = {p.logits_soft_cap * kLog2E, magnitude / p.logits_soft_cap, rule.alibi};
  if (magnitude == 0.0f) rule = {kLog2E, 0.0f, rule.alibi};  // q is multiplied by 0
  return {p, h.num_qo_heads / h.num_kv_heads, num_digits, float(p.sm_scale > 0) - float(p.sm_scale < 0), rule};
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
  const F32x16 divisor = set1(denominator == 0.0f ? 1.0f : denominator);
  with_element(p.q_dtype, [&](auto element) {
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
  float *q_factor, *q_sum;             // [rows]: integer products only
  SoftmaxState state;
  float* out;                          // [rows][head_dim_vo], not yet normalised
  float *scores, *products, *alpha;    // of one group: [kMaxRows][kTileKeys], [kMaxRows][head_dim_vo], [16]
  uint32_t* weights;                   // [kMaxRows][units of kTileKeys tokens]
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
  m.q = carver.take<uint32_t>(rows * launch.num_digits * num_units<C>(p.head_dim_qk));
  m.q_factor = carver.take<float>(rows);
  m.q_sum = carver.take<float>(rows);
  m.state = {carver.take<float>(rows), carver.take<float>(rows * 16)};
  m.out = carver.take<float>(rows * p.head_dim_vo);
  m.scores = carver.take<float>(kMaxRows * kTileKeys);
  m.products = carver.take<float>(int64_t(kMaxRows) * p.head_dim_vo);
  m.alpha = carver.take<float>(16);
  m.weights = carver.take<uint32_t>(kMaxRows * kTileKeys);
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
    for (int r = 0; r < num_rows_; ++r) {
      with_element(p_.q_dtype, [&](auto element) {
        using E = decltype(element);
        const auto* q = static_cast<const typename E::Storage*>(p_.q) + tokens_[token_of(r)] * p_.q_token_stride +
                        head_of(r) * p_.q_head_stride;
        for (int d = 0; d < p_.head_dim_qk; d += 16) store(m_.row + d, mul(E::load(q + d), set1(launch_.q_sign)));
      });
      store_q_row(r);
    }
  }

  void store_q_row(int r) {
    const int num = p_.head_dim_qk;
    uint32_t* q = m_.q + int64_t(r) * launch_.num_digits * units_;
    if constexpr (C::kInteger) {
      const Digits digits = to_digits(m_.row, nullptr, num, launch_.num_digits, q);
      m_.q_factor[r] = digits.factor;
      m_.q_sum[r] = digits.dot * digits.factor;
    } else if constexpr (C::kPair == 2) {
      for (int d = 0; d < num; d += 16) store_bf16(reinterpret_cast<uint16_t*>(q) + d, load(m_.row + d));
    } else {
      std::memcpy(q, m_.row, sizeof(float) * num);
    }
  }

  void walk_tiles() {
    const TileReader<C> reader(p_, job_, m_.pack);
    const int groups = int(ceil_div(num_rows_, kMaxRows / launch_.num_digits));
    TileBlocks tile, next;
    int begin = job_.kv_begin / kTileKeys * kTileKeys;
    if (begin < job_.kv_end) reader.locate(begin, tile);
    for (; begin < job_.kv_end; begin += kTileKeys) {
      next = tile;
      if (begin + kTileKeys < job_.kv_end) reader.locate(begin + kTileKeys, next);
      std::copy(next.k, next.k + kTileBlocks, tile.next_k);
      std::copy(next.v, next.v + kTileBlocks, tile.next_v);
      reader.prepare(begin, tile);
      if constexpr (C::kInteger) reader.read_scales(begin, *m_.scales);
      for (int g = 0; g < groups; ++g) {
        const int row_begin = num_rows_ * g / groups, row_end = num_rows_ * (g + 1) / groups;
        attend(begin, tile, row_begin, row_end - row_begin);
      }
      tile = next;
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
  void attend(int tile_begin, const TileBlocks& tile, int row_begin, int rows) {
    RowView views[kMaxRows];
    int lo = kTileKeys, hi = 0;
    for (int r = 0; r < rows; ++r) {
      views[r] = view_of(tile_begin, row_begin + r);
      if (views[r].lo < views[r].hi) lo = std::min(lo, views[r].lo), hi = std::max(hi, views[r].hi);
    }
    if (lo >= hi) return;
    const int block_begin = lo / kKvBlockTokens, block_end = int(ceil_div(hi, kKvBlockTokens));
    const int product_rows = rows * launch_.num_digits;
    tile_scores<C>(product_rows, m_.q + int64_t(row_begin) * launch_.num_digits * units_, units_, tile, block_begin,
                   block_end, m_.scores);
    if constexpr (C::kInteger) scores_from_digits(row_begin, rows);
    softmax_step<C>(rows, m_.scores, launch_.rule, views,
                    {m_.state.max + row_begin, m_.state.sum + 16 * int64_t(row_begin)}, m_.alpha, m_.weights);
    float* out = m_.out + int64_t(row_begin) * p_.head_dim_vo;
    if constexpr (C::kInteger) {
      add_integer_values(rows, tile, block_begin, block_end, out);
    } else {
      const auto* weights = C::kPair == 2 ? m_.weights : reinterpret_cast<const uint32_t*>(m_.scores);
      tile_values<C>(rows, weights, tile, block_begin, block_end, p_.head_dim_vo, m_.alpha, out);
    }
  }

  // [rows][digits][kTileKeys] products -> [rows][kTileKeys] scores, in place.
  void scores_from_digits(int row_begin, int rows) {
    const int digits = launch_.num_digits;
    for (int r = 0; r < rows; ++r) {
      const float* products = m_.scores + r * digits * kTileKeys;
      const F32x16 factor = set1(m_.q_factor[row_begin + r]), sum = set1(m_.q_sum[row_begin + r]);
      for (int j = 0; j < kTileKeys; j += 16) {
        const F32x16 dot = mul(from_digits(products + j, digits, kTileKeys), factor);
        const F32x16 shift = mul(load(m_.scales->k_zero + j), sum);
        store(m_.scores + r * kTileKeys + j, fma(dot, load(m_.scales->k_scale + j), shift));
      }
    }
  }

  void add_integer_values(int rows, const TileBlocks& tile, int block_begin, int block_end, float* out) {
    const int digits = launch_.num_digits;
    Digits scaled[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      float* w = m_.scores + r * kTileKeys;
      for (int j = 0; j < kTileKeys; j += 16) store(w + j, mul(load(w + j), load(m_.scales->v_scale + j)));
      scaled[r] = to_digits(w, m_.scales->v_zero_steps, kTileKeys, digits, m_.weights + r * digits * num_units<C>(kTileKeys));
    }
    tile_values<C>(rows * digits, m_.weights, tile, block_begin, block_end, p_.head_dim_vo, m_.alpha, m_.products);
    for (int r = 0; r < rows; ++r) {
      for (int d = 0; d < p_.head_dim_vo; d += 16) {
        float* o = out + int64_t(r) * p_.head_dim_vo + d;
        const F32x16 value = from_digits(m_.products + int64_t(r) * digits * p_.head_dim_vo + d, digits, p_.head_dim_vo);
        const F32x16 sum = mul(add(value, set1(scaled[r].dot)), set1(scaled[r].factor));
        store(o, fma(load(o), set1(m_.alpha[r]), sum));
      }
    }
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
  const int num_digits = !C::kInteger ? 1 : p.q_dtype == DType::kFloat32 ? 3 : 2;
  const Launch launch = make_launch(p, num_digits);
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
  switch (p.kv_dtype) {
    case DType::kFloat32: return run_launch<Float32Cache>(p);
    case DType::kFloat16: return run_launch<Float16Cache>(p);
    case DType::kBFloat16: return run_launch<BFloat16Cache>(p);
    case DType::kUInt8: return run_launch<Int8Cache>(p);
    case DType::kUInt4: return run_launch<Int4Cache>(p);
  }
}

}  // namespace tilestream::cpu::TILESTREAM_LEVEL
