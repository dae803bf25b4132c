// What a warp does with a tile of K and V, on tensor cores, and what it keeps of the tiles before.
//
// Two ways to divide a row tile among the warps:
// - own rows: warp w has rows 16 w + 64 f + 0..15 (fragment f), all keys of a tile and all columns of out;
// - shared rows (at most 16, a decode): a warp takes the scores and the weights of 16 keys of the tile, and
//   its share of out's columns for all keys. Warps exchange row maxima, which takes a barrier, and weights,
//   behind the barrier at which V arrives.
// A row's bits are the same in both: each score is one chain of mma over head_dim, a maximum has no order,
// and each output column is one chain of mma over the keys. So the planner may cut, and the kernel choose, as
// they like.
//
// unified: shared rows weigh by 2^(logit - unified_max), a maximum given beforehand (FlashDecoding++,
// 2311.01282, section 3): no exchange of maxima, no rescaling. in_range() tells in the end whether the result
// may be kept.
#pragma once

#include "cuda/attention_config.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace tilestream::cuda {

// How far, in powers of two, a row's largest logit may lie below and above the unified maximum. float16
// weights lose bits below 2^-14 and end at 2^16; bfloat16's have float32's range, and leave room for a sum
// and for large V.
template <class T>
constexpr float kUnifiedBelow = std::is_same_v<T, __half> ? 8.0f : 64.0f;
template <class T>
constexpr float kUnifiedAbove = std::is_same_v<T, __half> ? 15.0f : 64.0f;

template <class C, int kFragments, bool kShared>
class WarpRows {
 public:
  using T = typename C::T;

  __device__ __forceinline__ WarpRows(const AttentionParams& p, const LogitRule& rule, int row_begin,
                                      bool unified, SharedStorage<C>& smem)
      : p_(p),
        rule_(rule),
        smem_(smem),
        warp_(ptx::opaque(threadIdx.x) / kWarpSize),
        lane_(ptx::opaque(threadIdx.x) % kWarpSize),
        first_row_(row_begin + (kShared ? 0 : warp_ * kFragmentRows)),
        unified_(kShared && unified) {
    const Job& job = smem.job;
    if (first_row_ < job.num_rows) {
      const int rows_end = first_row_ + (kFragments - 1) * kFragmentStride + kFragmentRows;
      const int last_row = min(rows_end, job.num_rows) - 1;
      any_begin_ = job.keys_begin(first_row_), any_end_ = job.keys_end(last_row);
      all_begin_ = job.keys_begin(last_row), all_end_ = job.keys_end(first_row_);
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
      max_[f][0] = max_[f][1] = unified_ ? p.unified_max * kLog2E : -INFINITY;
  }

  // Shared rows: every warp needs all of q for every tile, and has registers for it. q lies in shared memory;
  // columns past head_dim_qk hold anything and are not used.
  __device__ __forceinline__ void keep_q() {
    static_assert(kShared);
    const int q_lane = matrix_row<C::kMaxDim>(lane_ % 16, lane_ / 16);
#pragma unroll
    for (int kc = 0; kc < C::kMaxDim / 16; ++kc)
      ptx::ldmatrix_x4(q_[kc], chunks_at<C::kMaxDim>(smem_.tiles.q, 0, q_lane, kc));
  }

  // The weights of the keys whose scores this warp takes, as fragments a of the second product.
  struct Weights {
    unsigned a[kFragments][kShared ? 1 : C::kTileKeys / 16][4];
  };

  // Tiles that no row of the warp sees may be passed over: they would leave its state as it is.
  __device__ __forceinline__ bool sees(int tile) const {
    return tile < any_end_ && tile + C::kTileKeys > any_begin_;
  }

  // The two halves of a tile. Between them lies a barrier of the block.
  __device__ __forceinline__ void attend_keys(T* k, int tile, Weights& weights) {
    float s[kFragments][kKeys / 8][4] = {};
    if (has_keys()) {
      add_scores(k, s);
      mask(tile + first_key(), s);
    }
    weigh(s);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int kc = 0; kc < kKeys / 16; ++kc) {
        unsigned(&a)[4] = weights.a[f][kc];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float(&pairs)[4] = s[f][2 * kc + e / 2];
          a[e] = pack<T>(pairs[e % 2 * 2], pairs[e % 2 * 2 + 1]);
        }
      }
    }
    if constexpr (kShared) {
      const unsigned(&a)[4] = weights.a[0][0];
      if (has_keys()) smem_.tiles.shared.weights[warp_][lane_] = {a[0], a[1], a[2], a[3]};
    }
  }

  __device__ __forceinline__ void attend_values(T* v, const Weights& own) {
    const int num_blocks = p_.head_dim_vo / 16, v_lane = matrix_row<C::kMaxDim>(lane_ % 16, lane_ / 16);
    const unsigned ones = pack<T>(1.0f, 1.0f);
#pragma unroll
    for (int kc = 0; kc < C::kTileKeys / 16; ++kc) {
      unsigned a[kFragments][4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[f][e] = kShared ? 0 : own.a[f][kShared ? 0 : kc][e];
      }
      if constexpr (kShared) {
        const uint4 shared = smem_.tiles.shared.weights[kc][lane_];
        a[0][0] = shared.x, a[0][1] = shared.y, a[0][2] = shared.z, a[0][3] = shared.w;
      }
      // The weights' sum, of the weights as they are stored: a column of ones beside V.
#pragma unroll
      for (int f = 0; f < kFragments; ++f) mma<T>(sum_[f], a[f], ones, ones);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (block(n) >= num_blocks) break;
        unsigned b[4];
        ptx::ldmatrix_x4_trans(b, chunks_at<C::kMaxDim>(v, kc * 16, v_lane, block(n)));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          mma<T>(out_[f][2 * n], a[f], b[0], b[1]);
          mma<T>(out_[f][2 * n + 1], a[f], b[2], b[3]);
        }
      }
    }
  }

  // Whether every row's largest logit was one that the unified maximum suits. The same for all threads, who
  // take part.
  __device__ __forceinline__ bool in_range() {
    static_assert(kShared);
    share_maxima(largest_);
    bool all = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float above = largest_[i] * rule_.to_log2() - max_[0][i];
      all = all && above >= -kUnifiedBelow<T> && above <= kUnifiedAbove<T>;
    }
    return __all_sync(kFullMask, all);
  }

  // Normalised outputs and their rows' log-sum-exps. Nobody reads the tiles any more.
  __device__ __forceinline__ void write() const {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = sum_[f][2 * i], inverse = 1.0f / (sum == 0.0f ? 1.0f : sum);
        const int row = q_row(f) + lane_ / 4 + 8 * i;
        if (lane_ % 4 == 0 && (!kShared || warp_ == 0))
          smem_.rows.lse_log2[row] = sum == 0.0f ? -INFINITY : max_[f][i] + log2f(sum);
#pragma unroll
        for (int n = 0; n < 2 * kBlocks; ++n) {
          const int d = block(n / 2) * 16 + n % 2 * 8 + lane_ % 4 * 2;
          auto& to = *reinterpret_cast<float2*>(&smem_.rows.out[row][d]);
          to = {out_[f][n][2 * i] * inverse, out_[f][n][2 * i + 1] * inverse};
        }
      }
    }
  }

 private:
  static constexpr int kKeys = kShared ? 16 : C::kTileKeys;  // of a tile, whose scores this warp takes
  static constexpr int kBlocks = C::kMaxDim / 16 / (kShared ? C::kWarps : 1);  // of 16 columns of out
  static constexpr int kFragmentStride = C::kWarps * kFragmentRows;

  __device__ __forceinline__ int first_key() const { return kShared ? warp_ * 16 : 0; }
  __device__ __forceinline__ bool has_keys() const { return !kShared || first_key() < C::kTileKeys; }
  __device__ __forceinline__ int block(int n) const { return kShared ? n * C::kWarps + warp_ : n; }
  __device__ __forceinline__ int q_row(int f) const {
    return kShared ? 0 : f * kFragmentStride + warp_ * kFragmentRows;
  }

  __device__ __forceinline__ void add_scores(T* k, float (&s)[kFragments][kKeys / 8][4]) const {
    const int num_chunks = p_.head_dim_qk / 16, q_lane = matrix_row<C::kMaxDim>(lane_ % 16, lane_ / 16);
    const int k_lane = matrix_row<C::kMaxDim>(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
#pragma unroll
    for (int kc = 0; kc < C::kMaxDim / 16; ++kc) {
      if (kc >= num_chunks) break;
      unsigned a[kFragments][4], b[4];
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if constexpr (kShared) {
#pragma unroll
          for (int e = 0; e < 4; ++e) a[f][e] = q_[kc][e];
        } else {
          ptx::ldmatrix_x4(a[f], chunks_at<C::kMaxDim>(smem_.tiles.q, q_row(f), q_lane, kc));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        ptx::ldmatrix_x4(b, chunks_at<C::kMaxDim>(k, first_key() + n * 16, k_lane, kc));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          mma<T>(s[f][2 * n], a[f], b[0], b[1]);
          mma<T>(s[f][2 * n + 1], a[f], b[2], b[3]);
        }
      }
    }
  }

  // Scores to logits, -inf where the row does not see the key. Rows past the job's end are its last row.
  __device__ __forceinline__ void mask(int keys_begin, float (&s)[kFragments][kKeys / 8][4]) const {
    const bool all_seen = all_begin_ <= keys_begin && all_end_ >= keys_begin + kKeys;
    if (rule_.cap_scale != 0.0f) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[f][n][e] = capped(s[f][n][e], rule_);
        }
      }
    }
    if (all_seen && !rule_.alibi) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row_ + f * kFragmentStride + lane_ / 4 + 8 * i;
        const RowView view(p_, smem_.job, min(row, smem_.job.num_rows - 1));
        const int key = keys_begin + lane_ % 4 * 2, begin = view.begin - key, end = view.end - key;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& v = s[f][n][2 * i + e];
            if (rule_.alibi) v = with_alibi(v, rule_, view.slope_log2, key + n * 8 + e - view.q_pos);
            if (n * 8 + e < begin || n * 8 + e >= end) v = -INFINITY;
          }
        }
      }
    }
  }

  // Logits to weights; what was accumulated moves to the new maximum.
  __device__ __forceinline__ void weigh(float (&s)[kFragments][kKeys / 8][4]) {
    const float to_log2 = rule_.to_log2();
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      float most[2] = {-INFINITY, -INFINITY};
      if (has_keys()) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          most[0] = fmaxf(most[0], fmaxf(s[f][n][0], s[f][n][1]));
          most[1] = fmaxf(most[1], fmaxf(s[f][n][2], s[f][n][3]));
        }
      }
      if (unified_) largest_[0] = fmaxf(largest_[0], most[0]), largest_[1] = fmaxf(largest_[1], most[1]);
      else rescale(f, most);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A row that has seen nothing has max = -inf; subtracting a finite number instead keeps its weights
        // 0, not NaN.
        const float finite = fmaxf(max_[f][i], -kFloatMax);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          s[f][n][2 * i] = ptx::ex2_approx(fmaf(s[f][n][2 * i], to_log2, -finite));
          s[f][n][2 * i + 1] = ptx::ex2_approx(fmaf(s[f][n][2 * i + 1], to_log2, -finite));
        }
      }
    }
  }

  // most: of the logits of this lane.
  __device__ __forceinline__ void rescale(int f, float (&most)[2]) {
    if constexpr (kShared) share_maxima(most);
    else quad_maxima(most);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Rounded here, once: the number that every weight of the row is relative to.
      const float max = fmaxf(max_[f][i], most[i] * rule_.to_log2());
      const float alpha = ptx::ex2_approx(max_[f][i] - fmaxf(max, -kFloatMax));
      max_[f][i] = max;
      sum_[f][2 * i] *= alpha, sum_[f][2 * i + 1] *= alpha;
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) out_[f][n][2 * i] *= alpha, out_[f][n][2 * i + 1] *= alpha;
    }
  }

  __device__ __forceinline__ static void quad_maxima(float (&most)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kFullMask, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kFullMask, most[i], 2));
    }
  }
  // All threads of the block take part.
  __device__ __forceinline__ void share_maxima(float (&most)[2]) const {
    auto& maxima = smem_.tiles.shared.maxima;
    quad_maxima(most);
    if (lane_ % 4 == 0) maxima[warp_][lane_ / 4] = most[0], maxima[warp_][lane_ / 4 + 8] = most[1];
    __syncthreads();
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      most[0] = fmaxf(most[0], maxima[w][lane_ / 4]);
      most[1] = fmaxf(most[1], maxima[w][lane_ / 4 + 8]);
    }
  }

  const AttentionParams& p_;
  const LogitRule& rule_;
  SharedStorage<C>& smem_;
  const int warp_, lane_, first_row_;
  const bool unified_;
  int any_begin_ = 0, any_end_ = 0;  // the keys that any row of the warp sees
  int all_begin_ = 0, all_end_ = 0;  // the keys that all see
  unsigned q_[kShared ? C::kMaxDim / 16 : 1][4];  // shared rows: fragments a of the first product
  float max_[kFragments][2];         // in base 2, of rows g and g + 8 of each fragment
  float largest_[2] = {-INFINITY, -INFINITY};  // unified: the largest logits
  float sum_[kFragments][4] = {};    // of the weights: [0] for row g, [2] for row g + 8
  float out_[kFragments][2 * kBlocks][4] = {};
};

}  // namespace tilestream::cuda
