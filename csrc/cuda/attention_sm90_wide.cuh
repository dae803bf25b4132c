// The Hopper attention's wide lane: a warpgroup's 64 rows through the key tiles of a row tile.
//
// Warpgroups take turns at starting their products, so that one's softmax hides under the others' tensor work; and a
// warpgroup's own softmax of tile i hides under its product of weights and values of tile i - 1 (FlashAttention-3, 2407.08608,
// sections 3.1 and 3.2).
// The maximum that a row's weights are relative to moves only when a tile has a logit more than kLazyLog2 powers of two above it:
// what was accumulated is then seldom rescaled. A row decides for itself, so its bits do not depend on its neighbours.
#pragma once

#include "cuda/attention_merge.cuh"
#include "cuda/attention_sm90_config.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/kv_values.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/fp8.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace tilestream::cuda {

// 2^x, for keys 8 n to 8 n + 7 of a tile. A head dim of 64 has as much work for the special function units as for the tensor
// cores: there every fourth goes to the FMA pipes.
template <class C>
__device__ __forceinline__ float exp2_of(int n, float x) {
  return C::kDimVo <= 64 && n % 4 == 3 ? exp2_polynomial(x) : ptx::ex2_approx(x);
}

// As converted_q, of e4m3 as it is.
__device__ __forceinline__ Vec<__nv_fp8_e4m3> signed_q(const AttentionParams& p, int64_t at, float sign, bool is_aligned) {
  using Values = Vec<__nv_fp8_e4m3>;
  const auto* const from = static_cast<const __nv_fp8_e4m3*>(p.q) + at;
  Values packed = is_aligned ? load_vec<true>(from, Values::kSize) : load_vec<false>(from, Values::kSize);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    unsigned& word = reinterpret_cast<unsigned*>(&packed)[w];
    word = sign == 0.0f ? 0 : sign < 0.0f ? word ^ 0x80808080u : word;
  }
  return packed;
}

// A warp's 16 rows of q, from row `first` of the job on, to where wgmma reads them; those past the job's end are its last row,
// columns past head_dim_qk 0, as K's are. Where q is as the products take it, it comes by copies that are still under way.
template <class C>
__device__ __forceinline__ void load_q(const AttentionParams& p, const LogitRule& rule, const Job& job, int first,
                                       unsigned char* q) {
  using T = typename C::T;
  constexpr int kChunks = C::kPanelsQk * C::kRowBytes / 16, kValues = Vec<T>::kSize;
  constexpr DType kType = C::kFloat8 ? DType::kFloat8E4M3 : std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  const unsigned thread = ptx::opaque(threadIdx.x), lane = thread % kWarpSize, warp = thread % kGroupThreads / kWarpSize;
  const auto place = [&](int i) {
    const unsigned r = warp * 16 + i / kChunks, byte = i % kChunks * 16;
    unsigned char* const panel = q + byte / C::kRowBytes * (kGroupRows * C::kRowBytes);
    return reinterpret_cast<Vec<T>*>(panel + ptx::swizzled(C::kSwizzle, r * C::kRowBytes + byte % C::kRowBytes));
  };
  const auto source = [&](int i) {
    const int row = min(first + i / kChunks, job.num_rows - 1);
    return job.token(row) * p.q_token_stride + job.head(row) * p.q_head_stride + i % kChunks * kValues;
  };
  const bool is_aligned = rows_aligned(p.q, dtype_bytes(p.q_dtype, 1), p.q_token_stride, p.q_head_stride);
  if (is_aligned && rule.q_sign == 1.0f && p.q_dtype == kType) {
#pragma unroll 4  // as many rows' tokens are looked up at once
    for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
      const bool is_column = i % kChunks * kValues < p.head_dim_qk;
      ptx::cp_async<16>(place(i), static_cast<const T*>(p.q) + (is_column ? source(i) : 0), is_column ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
    Vec<T> packed{};
    if (i % kChunks * kValues < p.head_dim_qk) {
      if constexpr (C::kFloat8) packed = signed_q(p, source(i), rule.q_sign, is_aligned);
      else packed = converted_q<T>(p, source(i), rule.q_sign, is_aligned);
    }
    *place(i) = packed;
  }
}

// Where a warp of the wide lane stands in its stream of row tiles.
template <class C>
struct RowCursor {
  JobRing& ring;
  RingPosition<JobRing::kJobs> at;
  int row_begin = 0;

  __device__ __forceinline__ const Job& job() const { return ring.jobs[at.stage()]; }
  __device__ __forceinline__ bool ended() const { return job().num_rows == 0; }
  __device__ __forceinline__ bool is_last_of_job() const { return row_begin + C::kRows >= job().num_rows; }
  // The row tile behind this one; its job may still be on its way.
  __device__ __forceinline__ RowCursor next() const {
    return is_last_of_job() ? RowCursor{ring, at.next()} : RowCursor{ring, at, row_begin + C::kRows};
  }
  __device__ __forceinline__ bool is_published() const {
    return ptx::mbarrier_test_wait_parity(&ring.full[at.stage()], at.full_parity());
  }
  __device__ __forceinline__ void wait() const { ptx::mbarrier_wait_parity(&ring.full[at.stage()], at.full_parity()); }
  // To the next, when it is published; what this one was of may be overwritten.
  __device__ __forceinline__ void advance() {
    if (!is_last_of_job()) {
      row_begin += C::kRows;
      return;
    }
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&ring.empty[at.stage()]);
    at.advance(), row_begin = 0;
    wait();
  }
};

template <class C>
class WideRows {
 public:
  using T = typename C::T;
  using Ring = RingPosition<C::kStages>;

  __device__ __forceinline__ WideRows(const AttentionParams& p, const LogitRule& rule, const Job& job, WideStorage<C>& s,
                                      int group, int row_begin)
      : p_(p), rule_(rule_of(p, rule, job)), job_(job), s_(s), group_(group), first_row_(row_begin + group * kGroupRows) {}

  // All tiles of the row tile, from where `ring` stands. Tiles that no row sees would leave all as it is: those of
  // [seen_begin, seen_end) are multiplied. Calls q_is_free() while the last product is under way, in which q has no part.
  template <class Free>
  __device__ __forceinline__ void attend(int tile, int tiles_end, Ring& ring, Free q_is_free) {
    int seen_begin = tiles_end, seen_end = tiles_end;
    if (first_row_ < job_.num_rows) {
      const int last_row = min(first_row_ + kGroupRows, job_.num_rows) - 1;
      seen_begin = job_.keys_begin(first_row_), seen_end = min(tiles_end, job_.keys_end(last_row));
      all_begin_ = job_.keys_begin(last_row), all_end_ = job_.keys_end(first_row_);
    }
    for (; tile < tiles_end && tile + C::kKeys <= seen_begin; tile += C::kKeys) pass_over(ring);
    if (tile < seen_end) {
      begin_turn();
      start_scores(ring);
      end_turn();
      ptx::wgmma_wait_group<0>(s_acc_);
      release(s_.k_empty, ring);
      float alpha[2];
      weigh(tile, alpha);
      pack();
      bool first = true;
      for (tile += C::kKeys; tile < seen_end; tile += C::kKeys) {
        begin_turn();
        start_scores(ring.next());
        start_out(ring, first);
        end_turn();
        ptx::wgmma_wait_group<1>(s_acc_);
        release(s_.k_empty, ring.next());
        weigh(tile, alpha);
        ptx::wgmma_wait_group<0>(out_, weights_);
        release(s_.v_empty, ring);
        rescale(alpha);
        pack();
        first = false;
        ring.advance();
      }
      start_out(ring, first);
      q_is_free();
      ptx::wgmma_wait_group<0>(out_, weights_);
      release(s_.v_empty, ring);
      ring.advance();
    }
    for (; tile < tiles_end; tile += C::kKeys) pass_over(ring);
    if (first_row_ < job_.num_rows) {
      write();
      const int warp_begin = first_row_ + warp() * 16;
      finish_parts(p_, job_, warp_begin, min(warp_begin + 16, job_.num_rows));
    }
  }

 private:
  // e4m3 is multiplied as it is stored: the job's scores are larger or smaller by its descales.
  __device__ __forceinline__ static decltype(auto) rule_of(const AttentionParams& p, const LogitRule& rule, const Job& job) {
    if constexpr (C::kFloat8) return rule.times(p.score_descale(job.at.kv_head));
    else return (rule);
  }

  __device__ __forceinline__ static int lane() { return ptx::opaque(threadIdx.x) % kWarpSize; }
  __device__ __forceinline__ static int warp() { return ptx::opaque(threadIdx.x) % kGroupThreads / kWarpSize; }
  // The row of registers with index 2 i + e.
  __device__ __forceinline__ int row(int i) const { return first_row_ + warp() * 16 + lane() / 4 + 8 * i; }

  __device__ __forceinline__ void pass_over(Ring& ring) const {
    begin_turn();
    end_turn();
    // Not before they are full: a warp must not be a whole round ahead of the others.
    ptx::mbarrier_wait_parity(&s_.k_full[ring.stage()], ring.full_parity());
    release(s_.k_empty, ring);
    ptx::mbarrier_wait_parity(&s_.v_full[ring.stage()], ring.full_parity());
    release(s_.v_empty, ring);
    ring.advance();
  }

  // One turn a tile for each warpgroup, in a circle.
  __device__ __forceinline__ void begin_turn() const { ptx::bar_sync(kTurn + group_, 2 * kGroupThreads); }
  __device__ __forceinline__ void end_turn() const {
    ptx::bar_arrive(kTurn + (group_ + 1 == C::kGroups ? 0 : group_ + 1), 2 * kGroupThreads);
  }

  __device__ __forceinline__ static void release(uint64_t* empty, const Ring& at) {
    if (lane() == 0) ptx::mbarrier_arrive(&empty[at.stage()]);
  }

  template <ptx::Major kMajorB, int kNum, class A>
  __device__ __forceinline__ static void multiply(float (&d)[kNum], const A& a, uint64_t b, bool accumulate) {
    if constexpr (C::kFloat8) {
      ptx::wgmma_m64k32_e4m3(d, a, b, accumulate);
    } else if constexpr (std::is_same_v<A, uint64_t>) {
      if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<ptx::Major::kK, kMajorB>(d, a, b, accumulate);
      else ptx::wgmma_m64k16_bf16<ptx::Major::kK, kMajorB>(d, a, b, accumulate);
    } else {
      if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<kMajorB>(d, a, b, accumulate);
      else ptx::wgmma_m64k16_bf16<kMajorB>(d, a, b, accumulate);
    }
  }

  // s_acc = q . K^T, of the tile at `keys`.
  __device__ __forceinline__ void start_scores(const Ring& keys) {
    ptx::mbarrier_wait_parity(&s_.k_full[keys.stage()], keys.full_parity());
    constexpr unsigned kEightRows = 8 * C::kRowBytes;
    // opaque: its eight descriptors would otherwise be kept through the loop, in 16 registers
    const uint64_t q = ptx::wgmma_descriptor(s_.q[ptx::opaque(group_)], C::kSwizzle, kEightRows);
    const uint64_t k = ptx::wgmma_descriptor(s_.k[keys.stage()], C::kSwizzle, kEightRows);
    ptx::wgmma_fence(s_acc_);
#pragma unroll
    for (int kc = 0; kc < C::kStepsQk; ++kc) {
      const unsigned panel = kc * 32 / C::kRowBytes, in_panel = kc * 32 % C::kRowBytes;
      multiply<ptx::Major::kK>(s_acc_, ptx::wgmma_advance(q, panel * (kGroupRows * C::kRowBytes) + in_panel),
                               ptx::wgmma_advance(k, panel * C::kPanelBytes + in_panel), kc > 0);
    }
    ptx::wgmma_commit_group();
  }

  // out (+)= weights . V, of the tile at `values`.
  __device__ __forceinline__ void start_out(const Ring& values, bool first) {
    ptx::mbarrier_wait_parity(&s_.v_full[values.stage()], values.full_parity());
    const unsigned char* const tile = s_.v[values.stage()];
    uint64_t v;
    if constexpr (C::kFloat8)
      v = ptx::wgmma_descriptor(tile, C::kKeys == 64 ? ptx::Swizzle::k64 : ptx::Swizzle::k128, 8 * C::kKeys);
    else v = ptx::wgmma_descriptor(tile, ptx::Swizzle::k128, 8 * kPanelRowBytes, C::kPanelBytes);
    ptx::wgmma_fence(out_, weights_);
#pragma unroll
    for (int kc = 0; kc < C::kStepsVo; ++kc)
      multiply<ptx::Major::kMN>(out_, weights_[kc], ptx::wgmma_advance(v, kc * (C::kFloat8 ? 32 : 16 * kPanelRowBytes)),
                                !first || kc > 0);
    ptx::wgmma_commit_group();
  }

  // Scores to logits, -inf where the row does not see the key. Rows past the job's end are its last row.
  __device__ __forceinline__ void mask(int tile) {
    if (rule_.cap_scale != 0.0f) {
#pragma unroll
      for (float& s : s_acc_) s = capped(s, rule_);
    }
    if (all_begin_ <= tile && all_end_ >= tile + C::kKeys && !rule_.alibi) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowView view(p_, job_, min(row(i), job_.num_rows - 1));
      const int key = tile + lane() % 4 * 2, begin = view.begin - key, end = view.end - key;
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = s_acc_[4 * n + 2 * i + e];
          if (rule_.alibi) s = with_alibi(s, rule_, view.slope_log2, key + n * 8 + e - view.q_pos);
          if (n * 8 + e < begin || n * 8 + e >= end) s = -INFINITY;
        }
      }
    }
  }

  // Scores to weights. alpha: what is accumulated has to be multiplied by it.
  __device__ __forceinline__ void weigh(int tile, float (&alpha)[2]) {
    mask(tile);
    const float to_log2 = rule_.to_log2();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n) most = fmaxf(most, fmaxf(s_acc_[4 * n + 2 * i], s_acc_[4 * n + 2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
      const float top = most * to_log2;
      alpha[i] = 1.0f;
      if (top > max_[i] + C::kLazyLog2) alpha[i] = ptx::ex2_approx(max_[i] - top), max_[i] = top;
      // A row that has seen nothing has max = -inf; subtracting a finite number instead keeps its weights 0, not NaN.
      const float finite = fmaxf(max_[i], -kFloatMax) - C::kWeightLog2;
      float sum[2] = {};  // two chains of additions
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = s_acc_[4 * n + 2 * i + e];
          s = exp2_of<C>(n, fmaf(s, to_log2, -finite));
          sum[e] += s;
        }
      }
      sum_[i] = fmaf(sum_[i], alpha[i], sum[0] + sum[1]);
    }
  }

  __device__ __forceinline__ void rescale(const float (&alpha)[2]) {
    if (!__any_sync(kFullMask, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
    for (int j = 0; j < C::kDimVo / 2; ++j) out_[j] *= alpha[j / 2 % 2];
  }

  // Weights as fragments a of the second product.
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int kc = 0; kc < C::kStepsVo; ++kc) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (C::kFloat8) {
          // Of 16 keys, 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t take places 4 t to 4 t + 3: transpose_tile() has V in this order.
          const float* const s = s_acc_ + 16 * kc + e / 2 * 8 + e % 2 * 2;
          weights_[kc][e] = ptx::cvt_e4m3x2(s[0], s[1]) | ptx::cvt_e4m3x2(s[4], s[5]) << 16;
        } else {
          weights_[kc][e] = cuda::pack<T>(s_acc_[8 * kc + 2 * e], s_acc_[8 * kc + 2 * e + 1]);
        }
      }
    }
  }

  // Four lanes have a row, in pairs of columns; for the writer each takes 8 neighbouring columns of every 32.
  __device__ __forceinline__ void write() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sum_[i];
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      const float inverse = 1.0f / (sum == 0.0f ? 1.0f : sum);
      const int row = this->row(i), column = lane() % 4;
      const RowWriter writer(p_, job_, min(row, job_.num_rows - 1),
                             sum == 0.0f ? -INFINITY : max_[i] - C::kWeightLog2 + log2f(sum), column == 0 && row < job_.num_rows);
#pragma unroll
      for (int block = 0; block < C::kDimVo / 32; ++block) {
        Floats8 columns;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float four[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) four[n] = out_[(block * 4 + n) * 4 + 2 * i + e] * inverse;
          transpose_quad(four);
#pragma unroll
          for (int t = 0; t < 4; ++t) columns.at[2 * t + e] = four[t];
        }
        const int d = block * 32 + column * 8;
        if (row < job_.num_rows && d < p_.head_dim_vo) writer.store_8(d, columns);
      }
    }
  }

  // Lane t of four gets v[t] of each of them, in their order.
  __device__ __forceinline__ static void transpose_quad(float (&v)[4]) {
    const int t = lane() % 4;
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      const bool upper = t & distance;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        if (a & distance) continue;
        float& low = v[a];
        float& high = v[a | distance];
        const float got = __shfl_xor_sync(kFullMask, upper ? low : high, distance);
        (upper ? low : high) = got;
      }
    }
  }

  const AttentionParams& p_;
  std::conditional_t<C::kFloat8, const LogitRule, const LogitRule&> rule_;
  const Job& job_;
  WideStorage<C>& s_;
  const int group_;
  const int first_row_;
  int all_begin_ = 0, all_end_ = 0;  // the keys that all see
  float max_[2] = {-INFINITY, -INFINITY};  // in base 2
  float sum_[2] = {};                      // of this lane's weights
  float s_acc_[C::kKeys / 2];              // scores, then weights, of the tile
  unsigned weights_[C::kStepsVo][4];
  float out_[C::kDimVo / 2] = {};
};

template <class C>
__device__ __forceinline__ void attend_wide(const AttentionParams& p, const LogitRule& rule, WideStorage<C>& s, int group) {
  RingPosition<C::kStages> ring;
  if (group == C::kGroups - 1) ptx::bar_arrive(kTurn, 2 * kGroupThreads);  // the first turn is the first warpgroup's
  if (threadIdx.x / kWarpSize == 4) write_empty_rows(p);                   // while the first tiles are on their way
  bool has_q = false;  // its copies are under way
  const auto start_q = [&](const RowCursor<C>& at) {
    const int first_row = int(ptx::opaque(threadIdx.x) - kGroupThreads) / kWarpSize * 16;
    load_q<C>(p, rule, at.job(), at.row_begin + first_row, s.q[group]);
    has_q = true;
  };
  RowCursor<C> cursor{s.jobs};
  for (cursor.wait(); !cursor.ended(); cursor.advance()) {
    if (!has_q) start_q(cursor);
    ptx::cp_async_wait_all();
    ptx::fence_proxy_async();
    ptx::bar_sync(kGroup + group, kGroupThreads);
    has_q = false;
    const RowTile tile = row_tile<C>(cursor.job(), cursor.row_begin);
    WideRows<C>(p, rule, cursor.job(), s, group, tile.row_begin).attend(tile.keys_begin, tile.keys_end, ring, [&] {
      ptx::bar_sync(kGroup + group, kGroupThreads);
      const RowCursor<C> next = cursor.next();
      if (next.is_published() && !next.ended()) start_q(next);
    });
  }
  if (group == 0) ptx::bar_sync(kTurn, 2 * kGroupThreads);  // the turn that nobody takes
}

}  // namespace tilestream::cuda
