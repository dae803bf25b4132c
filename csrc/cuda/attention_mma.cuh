// Attention on tensor cores: tiles of up to 64 rows (tokens x q heads of one kv head) by kTileKeys keys.
//
// A block of 4 warps is a worker (or several, if the plan has more workers than the device holds blocks): it walks the
// worker's jobs, of a job the row tiles, and of a row tile the key tiles. K and V come by cp.async, the next tile while
// this one is computed; warp w has rows 16 w to 16 w + 15 of the row tile and all its keys.
//   scores = q . K^T (mma m16n8k16), an online-softmax step in base 2, out = alpha * out + P . V
// with P as it is stored for the second product, whose sum is taken by the same tensor core: a column of ones beside V.
// Caches of 8 or 4 bits are copied as they are; each thread then turns the bytes that it copied itself into T.
// A row's bits depend on its own q, its job's keys and its mask, and on nothing else: tiles begin at multiples of
// kTileKeys, and a tile in which a row sees no key leaves its state as it was.
// Decode is bound by reading K and V; prefill by mma. Shared memory: Q tile + 2 stages of K and V (see SharedStorage).
// Source: FlashAttention-2 (2307.08691), online softmax (1805.02867).
#pragma once

#include "cuda/attention_job.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace tilestream::cuda {

// T: element of the products, __half or __nv_bfloat16. kMaxDim: 64, 128 or 256, at least both head dims.
template <class T_, class KV_, int kMaxDim_>
struct MmaConfig {
  using T = T_;
  using KV = KV_;
  static constexpr int kMaxDim = kMaxDim_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kRows = 16 * kWarps;
  static constexpr int kTileKeys = kMaxDim == 256 ? 32 : 64;  // 99 KB of shared memory are all that sm_86 and sm_89 have
  static constexpr int kTileElements = kTileKeys * kMaxDim;
  // A copy: 16 values of 8 or 4 bits, of integers with their (scale, zero); 8 values of a wider row.
  static constexpr bool kQuantised = kKvBits<KV> <= 8, kHasScales = kIsQuantised<KV>;
  static constexpr int kChunkValues = kQuantised ? 16 : 8, kChunkBytes = kChunkValues * kKvBits<KV> / 8;
  static constexpr int kChunksPerRow = kMaxDim / kChunkValues, kRowsPerPass = kThreads / kChunksPerRow;
  static constexpr int kPasses = kTileKeys / kRowsPerPass;
  static_assert(kTileKeys % kRowsPerPass == 0 && kThreads % kChunksPerRow == 0);
};

// What a quantised cache's copies fill, by stage and side.
template <class C, bool = C::kQuantised>
struct RawStages {
  alignas(16) uint8_t bytes[2][2][C::kPasses][C::kThreads][C::kChunkBytes];
  __half2 scales[2][2][C::kPasses][C::kHasScales ? C::kThreads : 1];  // unused of e4m3
};
template <class C>
struct RawStages<C, false> {};

template <class C>
struct SharedStorage {
  static constexpr int kStages = C::kQuantised ? 1 : 2;
  alignas(128) typename C::T q[C::kRows * C::kMaxDim];
  alignas(128) typename C::T kv[kStages][2][C::kTileElements];  // K, V
  RawStages<C> raw;
  Job job;
};

// Place of 16-byte chunk `chunk` of a row: swizzled, so that 8 rows at one chunk lie in 8 different bank groups.
template <int kMaxDim, class T>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int chunk) {
  return tile + row * kMaxDim + (chunk ^ (row & 7)) * 8;
}

template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) return ptx::cvt_f16x2(low, high);
  else return ptx::cvt_bf16x2(low, high);
}
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, __half>) ptx::mma_m16n8k16_f16(d, a, b);
  else ptx::mma_m16n8k16_bf16(d, a, b);
}

// A thread's share of a tile's copies: one chunk of a row in each pass.
template <class C>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const AttentionParams& p, const Job& job, SharedStorage<C>& smem)
      : job_(job), smem_(smem), chunk_(threadIdx.x % C::kChunksPerRow), row_(threadIdx.x / C::kChunksPerRow) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      sides_[side] = kv_rows<typename C::KV>(p, side, job.at.kv_head, job.num_kv_heads, job.page_size);
      has_chunk_[side] = chunk_ * C::kChunkValues < (side == 0 ? p.head_dim_qk : p.head_dim_vo);
    }
  }

  // Starts the copies of the tile at `tile_begin`. Keys outside the job are zeros: their weight is 0, but what lies there
  // may be NaN. Their page is not looked up.
  __device__ __forceinline__ void copy(int tile_begin, int stage) const {
#pragma unroll 2
    for (int pass = 0; pass < C::kPasses; ++pass) {
      const int row = pass * C::kRowsPerPass + row_, key = tile_begin + row;
      const bool is_mine = key >= job_.at.kv_begin && key < job_.at.kv_end;
      const int64_t page = is_mine ? job_.page(key) : 0;
      const int offset = is_mine ? job_.offset(key) : 0;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!has_chunk_[side]) continue;
        const char* from = sides_[side].row(page, offset) + chunk_ * C::kChunkBytes;
        if constexpr (C::kQuantised) {
          ptx::cp_async<C::kChunkBytes>(smem_.raw.bytes[stage][side][pass][threadIdx.x], from, is_mine ? C::kChunkBytes : 0);
          if constexpr (C::kHasScales) {
            __half2* const scale = &smem_.raw.scales[stage][side][pass][threadIdx.x];
            ptx::cp_async<4>(scale, sides_[side].scale(page, offset), is_mine ? 4 : 0);
          }
        } else {
          ptx::cp_async<16>(chunk_at<C::kMaxDim>(smem_.kv[stage][side], row, chunk_), from, is_mine ? 16 : 0);
        }
      }
    }
    ptx::cp_async_commit_group();
  }

  // Quantised caches: what this thread copied, as T in the tile.
  __device__ __forceinline__ void unpack(int stage) const {
    using T = typename C::T;
#pragma unroll
    for (int pass = 0; pass < C::kPasses; ++pass) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!has_chunk_[side]) continue;
        float2 scale{};
        if constexpr (C::kHasScales) scale = __half22float2(smem_.raw.scales[stage][side][pass][threadIdx.x]);
        const char* bytes = reinterpret_cast<const char*>(smem_.raw.bytes[stage][side][pass][threadIdx.x]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const to = chunk_at<C::kMaxDim>(smem_.kv[0][side], pass * C::kRowsPerPass + row_, chunk_ * 2 + half);
          unpack_values<typename C::KV>(to, bytes, half * 8, scale);
        }
      }
    }
  }

 private:
  const Job& job_;
  SharedStorage<C>& smem_;
  KvRows sides_[2];
  bool has_chunk_[2];
  const int chunk_, row_;
};

// A warp's 16 rows: this lane has rows g and g + 8, of each 8 columns the pair 2 t (g = lane / 4, t = lane % 4).
template <class C>
class WarpRows {
 public:
  using T = typename C::T;

  __device__ __forceinline__ WarpRows(const AttentionParams& p, const Job& job, const LogitRule& rule, int first_row)
      : rule_(rule),
        first_row_(first_row),
        lane_(threadIdx.x % kWarpSize),
        num_qk_(p.head_dim_qk / 16),
        num_vo_(p.head_dim_vo / 16),
        view_{RowView(p, job, first_row + lane_ / 4), RowView(p, job, first_row + lane_ / 4 + 8)} {
    const int last_row = min(first_row + 16, job.num_rows) - 1;
    begin_ = first_row <= last_row ? job.keys_begin(first_row) : 0;
    end_ = first_row <= last_row ? job.keys_end(last_row) : 0;
  }

  // One tile of keys. Tiles that no row of the warp sees are passed over.
  __device__ __forceinline__ void attend(T* q, T* k, T* v, int tile_begin) {
    if (tile_begin >= end_ || tile_begin + C::kTileKeys <= begin_) return;
    float s[C::kTileKeys / 8][4] = {};
    scores(q, k, s);
    mask(tile_begin, s);
    softmax_step(s);
    add_values(v, s);
  }

  __device__ __forceinline__ void write(const AttentionParams& p, const Job& job) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row_ + lane_ / 4 + 8 * i;
      if (row >= job.num_rows) continue;
      const float sum = sum_[2 * i], divisor = sum == 0.0f ? 1.0f : sum;
      const float lse_log2 = sum == 0.0f ? -INFINITY : max_[i] * rule_.to_log2() + log2f(sum);
      const RowWriter writer(p, job, row, lse_log2, lane_ % 4 == 0);
#pragma unroll
      for (int n = 0; n < C::kMaxDim / 8; ++n) {
        if (n >= 2 * num_vo_) break;
        const int d = n * 8 + lane_ % 4 * 2;
        writer.store(d, out_[n][2 * i] / divisor);
        writer.store(d + 1, out_[n][2 * i + 1] / divisor);
      }
    }
  }

 private:
  __device__ __forceinline__ void scores(T* q, T* k, float (&s)[C::kTileKeys / 8][4]) const {
    const int i = lane_ / 8, r = lane_ % 8, warp_row = threadIdx.x / kWarpSize * 16;
#pragma unroll 4
    for (int kc = 0; kc < num_qk_; ++kc) {
      unsigned a[4], b[4];
      ptx::ldmatrix_x4(a, chunk_at<C::kMaxDim>(q, warp_row + i % 2 * 8 + r, 2 * kc + i / 2));
#pragma unroll
      for (int n = 0; n < C::kTileKeys / 16; ++n) {
        ptx::ldmatrix_x4(b, chunk_at<C::kMaxDim>(k, n * 16 + i / 2 * 8 + r, 2 * kc + i % 2));
        mma<T>(s[2 * n], a, b[0], b[1]);
        mma<T>(s[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // Scores to logits, -inf where the row does not see the key.
  __device__ __forceinline__ void mask(int tile_begin, float (&s)[C::kTileKeys / 8][4]) const {
    const int tile_end = tile_begin + C::kTileKeys;
    const bool all_seen = view_[0].begin <= tile_begin && view_[0].end >= tile_end && view_[1].begin <= tile_begin && view_[1].end >= tile_end;
    if (all_seen && rule_.cap_scale == 0.0f && !rule_.alibi) return;
#pragma unroll
    for (int n = 0; n < C::kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowView& view = view_[e / 2];
        const int key = tile_begin + n * 8 + lane_ % 4 * 2 + e % 2;
        s[n][e] = view.sees(key) ? logit(s[n][e], rule_, view.slope_log2, key - view.q_pos) : -INFINITY;
      }
    }
  }

  // Logits to weights; what was accumulated moves to the new maximum.
  __device__ __forceinline__ void softmax_step(float (&s)[C::kTileKeys / 8][4]) {
    const float to_log2 = rule_.to_log2();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = max_[i];
#pragma unroll
      for (int n = 0; n < C::kTileKeys / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
      // A row that has seen nothing has max = -inf; subtracting a finite number instead keeps its weights 0, not NaN.
      const float finite = fmaxf(most, -kFloatMax), alpha = ptx::ex2_approx((max_[i] - finite) * to_log2);
      max_[i] = most;
#pragma unroll
      for (int n = 0; n < C::kTileKeys / 8; ++n) {
        s[n][2 * i] = ptx::ex2_approx((s[n][2 * i] - finite) * to_log2);
        s[n][2 * i + 1] = ptx::ex2_approx((s[n][2 * i + 1] - finite) * to_log2);
      }
      sum_[2 * i] *= alpha, sum_[2 * i + 1] *= alpha;
#pragma unroll
      for (int n = 0; n < C::kMaxDim / 8; ++n) out_[n][2 * i] *= alpha, out_[n][2 * i + 1] *= alpha;
    }
  }

  __device__ __forceinline__ void add_values(T* v, const float (&s)[C::kTileKeys / 8][4]) {
    const int i = lane_ / 8, r = lane_ % 8;
    const unsigned ones = pack<T>(1.0f, 1.0f);
#pragma unroll
    for (int kc = 0; kc < C::kTileKeys / 16; ++kc) {
      const unsigned a[4] = {pack<T>(s[2 * kc][0], s[2 * kc][1]), pack<T>(s[2 * kc][2], s[2 * kc][3]),
                             pack<T>(s[2 * kc + 1][0], s[2 * kc + 1][1]), pack<T>(s[2 * kc + 1][2], s[2 * kc + 1][3])};
      mma<T>(sum_, a, ones, ones);
#pragma unroll
      for (int n = 0; n < C::kMaxDim / 16; ++n) {
        if (n >= num_vo_) break;
        unsigned b[4];
        ptx::ldmatrix_x4_trans(b, chunk_at<C::kMaxDim>(v, kc * 16 + i % 2 * 8 + r, 2 * n + i / 2));
        mma<T>(out_[2 * n], a, b[0], b[1]);
        mma<T>(out_[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  const LogitRule& rule_;
  const int first_row_, lane_, num_qk_, num_vo_;
  int begin_, end_;  // keys that any row of the warp sees
  const RowView view_[2];
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[4] = {};  // of the weights: [0] for row g, [2] for row g + 8
  float out_[C::kMaxDim / 8][4] = {};
};

// Rows row_begin .. row_begin + kRows of the job as T, zeros past its end.
template <class C>
__device__ __forceinline__ void load_q_tile(const AttentionParams& p, const Job& job, float sign, int row_begin, typename C::T* q) {
  const int chunks = p.head_dim_qk / 8;
  for (int i = threadIdx.x; i < C::kRows * chunks; i += C::kThreads) {
    const int r = i / chunks, chunk = i % chunks, row = row_begin + r;
    if (row >= round_up(job.num_rows, 16)) break;  // no warp reads further
    Vec<typename C::T> values{};
    if (row < job.num_rows) {
      const int64_t token = job.token(row);
#pragma unroll
      for (int k = 0; k < 8; ++k) values.at[k] = from_float<typename C::T>(load_q(p, token, job.head(row), chunk * 8 + k, sign));
    }
    *reinterpret_cast<Vec<typename C::T>*>(chunk_at<C::kMaxDim>(q, r, chunk)) = values;
  }
}

template <class C>
__device__ __forceinline__ void run_row_tile(const AttentionParams& p, const LogitRule& rule, const Job& job, int row_begin,
                                             SharedStorage<C>& smem) {
  const int last_row = min(row_begin + C::kRows, job.num_rows) - 1;
  const int begin = job.keys_begin(row_begin) / C::kTileKeys * C::kTileKeys, end = job.keys_end(last_row);
  const TileLoader<C> loader(p, job, smem);
  WarpRows<C> rows(p, job, rule, row_begin + threadIdx.x / kWarpSize * 16);
  __syncthreads();  // nobody reads the tile before any more
  loader.copy(begin, 0);
  load_q_tile<C>(p, job, rule.q_sign, row_begin, smem.q);
  for (int tile = begin, stage = 0; tile < end; tile += C::kTileKeys, stage ^= 1) {
    if (tile + C::kTileKeys < end) loader.copy(tile + C::kTileKeys, stage ^ 1);
    else ptx::cp_async_commit_group();  // empty, so that all but the last are always this tile's
    ptx::cp_async_wait_group<1>();
    if constexpr (C::kQuantised) loader.unpack(stage);
    __syncthreads();
    auto& kv = smem.kv[C::kQuantised ? 0 : stage];
    rows.attend(smem.q, kv[0], kv[1], tile);
    __syncthreads();
  }
  ptx::cp_async_wait_all();
  rows.write(p, job);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads) attention_mma_kernel(const __grid_constant__ AttentionParams p,
                                                                    const __grid_constant__ LogitRule rule) {
  auto& smem = dynamic_smem<SharedStorage<C>>();
  walk_jobs(p, smem.job, [&] {
    for (int row = 0; row < smem.job.num_rows; row += C::kRows) run_row_tile<C>(p, rule, smem.job, row, smem);
  });
}

}  // namespace tilestream::cuda
