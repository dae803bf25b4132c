// The Hopper attention's narrow lane: up to 16 rows (a decode's query heads of one kv head) through tiles of 64 keys.
//
// Bound by reading K and V, so that all else should take few registers and stay out of the wide lane's way. The tensor cores
// take 64 rows at least: here these are keys, then columns of V, and the job's rows are the 8 or 16 columns of the products:
//   scores^T = K q^T, out^T += V^T weights^T, K and V as they lie in shared memory.
// A panel (64 keys by 64 columns, 8 KB) is what a slot of the ring holds. K of tile i + 1 comes before V of tile i: its product
// runs under the softmax of tile i, and who waits for memory holds no slot.
// Each warp has 16 of the 64 keys. A row's maximum is lazy (kLazyLog2): the warps agree on one at the first tile that a row
// sees, and again only when a logit is far above it, which a flag beside the weights tells. So tiles seldom exchange maxima,
// which is what a maximum calibrated beforehand would give (FlashDecoding++, 2311.01282): p.unified_max is not needed.
// Caches of 8 and 4 bits come as they are, and become fragments a of the products in registers: scale and zero are applied value
// by value, 2.5 instructions each, so that such a cache is bound by these rather than by memory (int8 nearly as long as memory
// takes, int4 twice as long; an estimate, from instructions).
// Source: swapped operands, FlashMLA's and FlashInfer's decodes ("swap AB"); Flash-Decoding.
#pragma once

#include "cuda/attention_sm90_narrow_lanes.cuh"
#include "cuda/attention_sm90_narrow_load.cuh"
#include "cuda/attention_sm90_wide.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace tilestream::cuda {

// kRows rows, 8 or 16, from first_row on. A thread has the keys 16 warp + g + 8 i of a tile (g = lane / 4, i < 2), the same
// columns of each panel of V, and the rows 8 j + 2 t + e (t = lane % 4, e < 2): scores[4 j + 2 i + e].
template <class C, int kRows>
class NarrowRows {
 public:
  using T = typename C::T;
  using KV = typename C::KV;
  using Ring = SlotPosition<C>;
  using Storage = NarrowStorage<C>;

  __device__ __forceinline__ NarrowRows(const AttentionParams& p, const LogitRule& rule, const Job& job, NarrowStorage<C>& s,
                                        int first_row)
      : p_(p), rule_(rule), job_(job), s_(s), first_row_(first_row) {
    const int last_row = min(first_row + kRows, job.num_rows) - 1;
    all_begin_ = job.keys_begin(last_row), all_end_ = job.keys_end(first_row);
#pragma unroll
    for (float& m : max_) m = -INFINITY;
  }

  // All tiles of the row tile, from where `ring` stands.
  __device__ __forceinline__ void attend(int tile, int tiles_end, Ring& ring) {
    load_q();
    if (tile < tiles_end) {
      Ring keys = take<Storage::kSlotsK>(ring);
      start_scores(keys);
      finish_scores(keys);
      for (unsigned buffer = 0;; buffer ^= 1, tile += NarrowTile::kKeys) {
        float logits[kRows / 2];
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) logits[i] = scores_[i];
        const bool is_last = tile + NarrowTile::kKeys >= tiles_end;
        if (!is_last) {
          keys = take<Storage::kSlotsK>(ring);
          start_scores(keys);
        }
        mask(tile, logits);
        if (needs_repair(tile)) repair(ring, tile);
        weigh(logits, buffer);
        if (!is_last) finish_scores(keys);
        add_values(take<Storage::kSlotsV>(ring), buffer);
        if (is_last) break;
      }
    }
    share_sums();
    if constexpr (C::kConverted) write_converted();
    else write();
    sync();  // each warp has written its columns of all rows, and now finishes its rows
    const int warp_begin = first_row_ + warp() * (kRows / 4);
    finish_parts(p_, job_, warp_begin, min(warp_begin + kRows / 4, job_.num_rows));
  }

 private:
  static constexpr unsigned kEightRows = 8 * kPanelRowBytes;

  __device__ __forceinline__ static int lane() { return ptx::opaque(threadIdx.x) % kWarpSize; }
  __device__ __forceinline__ static int warp() { return ptx::opaque(threadIdx.x) % kGroupThreads / kWarpSize; }
  __device__ __forceinline__ static void sync() { ptx::bar_sync(kGroup + C::kGroups, kGroupThreads); }
  // Of this thread's 2 j + e.
  __device__ __forceinline__ static int row(int index) { return index / 2 * 8 + lane() % 4 * 2 + index % 2; }

  // Rows past the job's end are its last row, columns past head_dim_qk 0, as K's are.
  __device__ __forceinline__ void load_q() const {
    constexpr int kChunks = C::kPanelsQk * 8;
    const bool is_aligned = rows_aligned(p_.q, dtype_bytes(p_.q_dtype, 1), p_.q_token_stride, p_.q_head_stride);
#pragma unroll 2
    for (int i = ptx::opaque(threadIdx.x) % kGroupThreads; i < kRows * kChunks; i += kGroupThreads) {
      const int r = i / kChunks, chunk = i % kChunks, row = min(first_row_ + r, job_.num_rows - 1);
      Vec<T> packed{};
      if (chunk * 8 < p_.head_dim_qk) {
        const int64_t at = job_.token(row) * p_.q_token_stride + job_.head(row) * p_.q_head_stride + chunk * 8;
        packed = converted_q<T>(p_, at, rule_.q_sign, is_aligned);
      }
      const auto place = [&](int column) {
        return s_.q + column / kPanelColumns * (kRows * kPanelRowBytes) +
               ptx::swizzled(ptx::Swizzle::k128, r * kPanelRowBytes + column % kPanelColumns * 2);
      };
      if constexpr (C::kConverted) {
#pragma unroll
        const auto* pairs = reinterpret_cast<const unsigned*>(&packed);
        for (int k = 0; k < 4; ++k) *reinterpret_cast<unsigned*>(place(fragment_column<C>(chunk * 8 + 2 * k))) = pairs[k];
      } else {
        *reinterpret_cast<Vec<T>*>(place(chunk * 8)) = packed;
      }
    }
    ptx::fence_proxy_async();
    sync();
  }

  // a, K or V of the ring, b, the job's rows.
  template <ptx::Major kMajorA>
  __device__ __forceinline__ static void multiply(float (&d)[kRows / 2], const unsigned (&a)[4], uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<ptx::Major::kK>(d, a, b, accumulate);
    else ptx::wgmma_m64k16_bf16<ptx::Major::kK>(d, a, b, accumulate);
  }
  template <ptx::Major kMajorA>
  __device__ __forceinline__ static void multiply(float (&d)[kRows / 2], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __half>) ptx::wgmma_m64k16_f16<kMajorA, ptx::Major::kK>(d, a, b, accumulate);
    else ptx::wgmma_m64k16_bf16<kMajorA, ptx::Major::kK>(d, a, b, accumulate);
  }

  // Scales come with the job's pages alone.
  __device__ __forceinline__ bool needs_repair(int tile) const {
    if constexpr (C::kConverted && C::kHasScales) return tile + NarrowTile::kKeys > job_.at.kv_end || tile < job_.at.kv_begin;
    else return has_foreign_keys<NarrowTile>(job_, tile);
  }

  template <int kPanels>
  __device__ __forceinline__ void release(const Ring& piece) const {
    if constexpr (C::kConverted) __syncwarp();  // all lanes have read it
    if (lane() < kPanels) ptx::mbarrier_arrive(&s_.empty[piece.slot(lane())]);
  }

  // Waits for a piece, and moves on behind it.
  template <int kPanels>
  __device__ __forceinline__ Ring take(Ring& ring) const {
    const Ring piece = ring;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel, ring.advance())
      ptx::mbarrier_wait_parity(&s_.full[ring.slot()], ring.full_parity());
    return piece;
  }
  __device__ __forceinline__ uint64_t descriptor(const Ring& piece, int panel) const {
    return ptx::wgmma_descriptor(s_.slots[piece.slot(panel)], ptx::Swizzle::k128, kEightRows);
  }

  // scores = K . q^T.
  __device__ __forceinline__ void start_scores(const Ring& keys) {
    if constexpr (C::kConverted) return start_converted_scores(keys);
    const uint64_t q = ptx::wgmma_descriptor(s_.q + ptx::opaque(0), ptx::Swizzle::k128, kEightRows);
    ptx::wgmma_fence(scores_);
#pragma unroll
    for (int panel = 0; panel < C::kPanelsQk; ++panel) {
      const uint64_t k = descriptor(keys, panel);
#pragma unroll
      for (int kc = 0; kc < min(4, C::kDimQk / 16 - 4 * panel); ++kc)
        multiply<ptx::Major::kK>(scores_, ptx::wgmma_advance(k, kc * 32),
                                 ptx::wgmma_advance(q, panel * (kRows * kPanelRowBytes) + kc * 32), panel + kc > 0);
    }
    ptx::wgmma_commit_group();
  }
  __device__ __forceinline__ void finish_scores(const Ring& keys) {
    ptx::wgmma_wait_group<0>(scores_);
    release<Storage::kSlotsK>(keys);
  }

  // out += V^T . weights^T.
  __device__ __forceinline__ void add_values(const Ring& values, unsigned buffer) {
    const uint64_t weights = ptx::wgmma_descriptor(s_.weights[buffer], ptx::Swizzle::k128, kEightRows);
    if constexpr (C::kConverted) {
      add_converted_values(values, weights);
      release<Storage::kSlotsV>(values);
      return;
    }
    ptx::wgmma_fence(out_);
#pragma unroll
    for (int panel = 0; panel < C::kPanelsVo; ++panel) {
      const uint64_t v = descriptor(values, panel);
#pragma unroll
      for (int kc = 0; kc < NarrowTile::kKeys / 16; ++kc)
        multiply<ptx::Major::kMN>(out_[panel], ptx::wgmma_advance(v, kc * 16 * kPanelRowBytes),
                                  ptx::wgmma_advance(weights, kc * 32), true);
    }
    ptx::wgmma_commit_group();
    wait_out(std::make_integer_sequence<int, C::kPanelsVo>{});
    release<Storage::kSlotsV>(values);
  }
  template <int... kPanel>
  __device__ __forceinline__ void wait_out(std::integer_sequence<int, kPanel...>) { ptx::wgmma_wait_group<0>(out_[kPanel]...); }

  // scores = K . q^T, of keys that become fragments a on the way: of this thread's two keys, in each step four of the columns
  // that are its own (fragment_column()).
  __device__ __forceinline__ void start_converted_scores(const Ring& keys) {
    constexpr int kBytes = kKvBits<KV>;  // of 8 values
    constexpr int kOwnBytes = C::kRawRowBytes / 4, kLoadBytes = kOwnBytes < 16 ? kOwnBytes : 16;
    using Words = std::conditional_t<kLoadBytes == 16, uint4, uint2>;
    const unsigned char* const tile = s_.slots[keys.slot()];
    const uint64_t q = ptx::wgmma_descriptor(s_.q + ptx::opaque(0), ptx::Swizzle::k128, kEightRows);
    const int key = warp() * 16 + lane() / 4;
    float2 scale[2];
    if constexpr (C::kHasScales)
      scale[0] = __half22float2(s_.scales[keys.slot()][key]), scale[1] = __half22float2(s_.scales[keys.slot()][key + 8]);
#pragma unroll
    for (int load = 0; load < kOwnBytes / kLoadBytes; ++load) {
      Words words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned at = (key + 8 * i) * C::kRawRowBytes + lane() % 4 * kOwnBytes + load * kLoadBytes;
        words[i] = *reinterpret_cast<const Words*>(tile + ptx::swizzled(kRawSwizzle<C>, at));
      }
#pragma unroll
      for (int n = 0; n < kLoadBytes / kBytes; ++n) {
        const int eight = load * (kLoadBytes / kBytes) + n;
        unsigned(&a)[2][4] = keys_[eight % 2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned* const from = reinterpret_cast<const unsigned*>(&words[i]) + n * kBytes / 4;
          Vec<T> values;
          if constexpr (C::kHasScales) values = kv_values<KV, T>(from, scale[i]);
          else values = e4m3_values<T>(from);
#pragma unroll
          for (int w = 0; w < 4; ++w) a[w / 2][w % 2 * 2 + i] = reinterpret_cast<const unsigned*>(&values)[w];
        }
        ptx::wgmma_fence(scores_, a);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int kc = 2 * eight + step;
          multiply<ptx::Major::kK>(scores_, a[step], ptx::wgmma_advance(q, kc / 4 * (kRows * kPanelRowBytes) + kc % 4 * 32),
                                   kc > 0);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>(keys_[1 - eight % 2]);  // before they are written again
      }
    }
  }

  // out += V^T . weights^T, of values that become fragments a on the way: those of four keys in each step, in this thread's
  // neighbouring columns.
  __device__ __forceinline__ void add_converted_values(const Ring& values, uint64_t weights) {
    constexpr int kColumns = 2 * C::kPanelsVo, kBytes = kColumns * kKvBits<KV> / 8;
    using Word = std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
    const unsigned char* const tile = s_.slots[values.slot()];
#pragma unroll
    for (int kc = 0; kc < NarrowTile::kKeys / 16; ++kc) {
      unsigned(&a)[C::kPanelsVo][4] = values_[kc % 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_key[2][kColumns];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = kc * 16 + half * 8 + lane() % 4 * 2 + e;
          const unsigned at = key * C::kRawRowBytes + (warp() * 8 + lane() / 4) * kBytes;
          const unsigned word = *reinterpret_cast<const Word*>(tile + ptx::swizzled(kRawSwizzle<C>, at));
          float2 scale{};
          if constexpr (C::kHasScales) scale = __half22float2(s_.scales[values.slot()][key]);
          kv_floats<KV>(word, scale, of_key[e]);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) a[c / 2][2 * half + c % 2] = pack<T>(of_key[0][c], of_key[1][c]);
      }
      ptx::wgmma_fence(out_, a);
#pragma unroll
      for (int panel = 0; panel < C::kPanelsVo; ++panel)
        multiply<ptx::Major::kK>(out_[panel], a[panel], ptx::wgmma_advance(weights, kc * 32), true);
      ptx::wgmma_commit_group();
      if (kc + 1 < NarrowTile::kKeys / 16) ptx::wgmma_wait_group<1>(values_[1 - kc % 2]);
    }
    wait_out(std::make_integer_sequence<int, C::kPanelsVo>{});
  }

  // Zeros in the rows of V that are not the job's, before weigh()'s barrier.
  __device__ __forceinline__ void repair(Ring values, int tile) const {
    if constexpr (C::kConverted && C::kHasScales) {  // scale and zero of 0
      const int key = ptx::opaque(threadIdx.x) % kGroupThreads;
      ptx::mbarrier_wait_parity(&s_.full[values.slot()], values.full_parity());
      if (key < NarrowTile::kKeys && (tile + key < job_.at.kv_begin || tile + key >= job_.at.kv_end))
        s_.scales[values.slot()][key] = {};
      return;
    }
    if constexpr (C::kConverted) {
      ptx::mbarrier_wait_parity(&s_.full[values.slot()], values.full_parity());
      const int begin = (job_.at.kv_end - tile) * C::kRawRowBytes / 16;
      auto* const rows = reinterpret_cast<uint4*>(s_.slots[values.slot()]);
      for (int i = begin + ptx::opaque(threadIdx.x) % kGroupThreads; i < Storage::kSlotBytes / 16; i += kGroupThreads)
        rows[i] = {};
      return;
    }
    const int first = job_.at.kv_end - tile, end = first + job_.page_size - job_.offset(job_.at.kv_end);
    for (int panel = 0; panel < C::kPanelsVo; ++panel, values.advance()) {
      if (panel % 4 != warp()) continue;
      ptx::mbarrier_wait_parity(&s_.full[values.slot()], values.full_parity());
      zero_rows<1>(s_.slots[values.slot()], NarrowTile::kKeys, first, end);
    }
  }

  // Scores to logits, -inf where the row does not see the key. Rows past the job's end are its last row.
  __device__ __forceinline__ void mask(int tile, float (&logits)[kRows / 2]) const {
    if (rule_.cap_scale != 0.0f) {
#pragma unroll
      for (float& s : logits) s = capped(s, rule_);
    }
    if (all_begin_ <= tile && all_end_ >= tile + NarrowTile::kKeys && !rule_.alibi) return;
    const int first_key = tile + warp() * 16 + lane() / 4;
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
      const RowView view(p_, job_, min(first_row_ + row(r), job_.num_rows - 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = logits[r / 2 * 4 + 2 * i + r % 2];
        const int key = first_key + 8 * i;
        if (rule_.alibi) s = with_alibi(s, rule_, view.slope_log2, key - view.q_pos);
        if (!view.sees(key)) s = -INFINITY;
      }
    }
  }

  // The base-2 logit relative to its row's maximum. A row that has seen nothing has a maximum of -inf; subtracting a finite
  // number instead keeps its weights 0, not NaN.
  __device__ __forceinline__ float relative(float logit, int r) const {
    return fmaf(logit, rule_.to_log2(), -fmaxf(max_[r], -kFloatMax));
  }

  // Logits to weights, in shared memory for all.
  __device__ __forceinline__ void weigh(const float (&logits)[kRows / 2], unsigned buffer) {
    float sum[kRows / 4];
    const bool is_above = store_weights(logits, buffer, sum);
    if (lane() == 0) s_.is_above[buffer][warp()] = is_above;
    ptx::fence_proxy_async();
    sync();
    if (*reinterpret_cast<const unsigned*>(s_.is_above[buffer]) != 0) {
      move_maxima(logits);
      store_weights(logits, buffer, sum);
      ptx::fence_proxy_async();
      sync();
    }
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) sum_[r] += sum[r];
  }

  // This warp's weights of the tile, and this thread's sums of them. Whether one is so large that its row's maximum has to move.
  __device__ __forceinline__ bool store_weights(const float (&logits)[kRows / 2], unsigned at, float (&sum)[kRows / 4]) const {
    float most = -INFINITY;
    unsigned packed[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // matrix of 8 keys by 8 rows: j = n / 2, i = n % 2
      // Eight rows have two of them; stored a second time, where nobody reads.
      if (n >= kRows / 4) { packed[n] = packed[n % 2]; continue; }
      float weight[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = relative(logits[2 * n + e], n / 2 * 2 + e);
        most = fmaxf(most, x);
        weight[e] = ptx::ex2_approx(x);
        float& to = sum[n / 2 * 2 + e];
        to = n % 2 == 0 ? weight[e] : to + weight[e];
      }
      packed[n] = pack<T>(weight[0], weight[1]);
    }
    // To [row][key]: lane l has the place of row l % 8 of matrix l / 8.
    const unsigned row = lane() / 16 * 8 + lane() % 8, chunk = warp() * 2 + lane() / 8 % 2;
    ptx::stmatrix_x4_trans(s_.weights[at] + ptx::swizzled(ptx::Swizzle::k128, row * kPanelRowBytes + chunk * 16), packed);
    return __any_sync(kFullMask, most > C::kLazyLog2);
  }

  // Rows with a logit of the tile far above their maximum take it as their maximum, and what they have accumulated moves there.
  // A row decides for itself, so its bits do not depend on its neighbours.
  __device__ __forceinline__ void move_maxima(const float (&logits)[kRows / 2]) {
    float most[kRows / 4];
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
      const float* const two = &logits[r / 2 * 4 + r % 2];
      most[r] = fmaxf(two[0], two[2]);
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2)
        most[r] = fmaxf(most[r], __shfl_xor_sync(kFullMask, most[r], distance));
      if (lane() < 4) s_.exchange[warp()][row(r)] = most[r];
    }
    sync();
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
#pragma unroll
      for (int w = 0; w < 4; ++w) most[r] = fmaxf(most[r], s_.exchange[w][row(r)]);
      float alpha = 1.0f;
      if (relative(most[r], r) > C::kLazyLog2) {
        const float top = most[r] * rule_.to_log2();
        alpha = ptx::ex2_approx(max_[r] - top), max_[r] = top;
      }
      sum_[r] *= alpha;
#pragma unroll
      for (int panel = 0; panel < C::kPanelsVo; ++panel) {
#pragma unroll
        for (int i = 0; i < 2; ++i) out_[panel][r / 2 * 4 + 2 * i + r % 2] *= alpha;
      }
    }
  }

  // sum_ of all threads that have weights of the row.
  __device__ __forceinline__ void share_sums() {
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2) sum_[r] += __shfl_xor_sync(kFullMask, sum_[r], distance);
      if (lane() < 4) s_.exchange[warp()][row(r)] = sum_[r];
    }
    sync();
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
      sum_[r] = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum_[r] += s_.exchange[w][row(r)];
    }
  }

  // Eight lanes have eight neighbouring columns, of two rows, two such blocks and two panels each: 8 numbers. Each takes one of
  // the eight blocks.
  __device__ __forceinline__ void write() const {
    const int g = lane() / 4, i = g / 2 % 2, e = g % 2;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      float inverse[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) inverse[k] = 1.0f / (sum_[2 * j + k] == 0.0f ? 1.0f : sum_[2 * j + k]);
      const float sum = e == 0 ? sum_[2 * j] : sum_[2 * j + 1], max = e == 0 ? max_[2 * j] : max_[2 * j + 1];
      const int row = first_row_ + 8 * j + lane() % 4 * 2 + e;
      const RowWriter writer(p_, job_, min(row, job_.num_rows - 1), sum == 0.0f ? -INFINITY : max + log2f(sum),
                             warp() == 0 && g < 2 && row < job_.num_rows);
#pragma unroll
      for (int panels = 0; panels < C::kPanelsVo; panels += 2) {
        Floats8 columns;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int panel = panels + k / 4;
          columns.at[k] = panel < C::kPanelsVo ? out_[panel][4 * j + k % 4] * inverse[k % 2] : 0.0f;
        }
        transpose_lanes(columns.at);
        const int d = (panels + g / 4) * kPanelColumns + warp() * 16 + 8 * i;
        if (row < job_.num_rows && d < p_.head_dim_vo) writer.store_8(d, columns);
      }
    }
  }

  // A thread has kColumns neighbouring columns of a row, kLanes lanes have 8 of them. Each takes one of as many rows.
  __device__ __forceinline__ void write_converted() const {
    constexpr int kColumns = 2 * C::kPanelsVo, kLanes = 8 / kColumns;
    const int place = lane() / 4 % kLanes, d = (warp() * 8 + lane() / 4 / kLanes * kLanes) * kColumns;
#pragma unroll
    for (int first = 0; first < kRows / 4; first += kLanes) {
      Floats8 columns;
      float sum = 0.0f, max = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float of_rows[kLanes];
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          const int r = first + k < kRows / 4 ? first + k : 0;
          if (place == k) sum = sum_[r], max = max_[r];
          of_rows[k] = out_[c / 2][r / 2 * 4 + c % 2 * 2 + r % 2] * (1.0f / (sum_[r] == 0.0f ? 1.0f : sum_[r]));
        }
        transpose_lanes(of_rows);
#pragma unroll
        for (int l = 0; l < kLanes; ++l) columns.at[l * kColumns + c] = of_rows[l];
      }
      const int row = first_row_ + this->row(first + place);
      const bool is_mine = first + place < kRows / 4 && row < job_.num_rows;
      const RowWriter writer(p_, job_, min(row, job_.num_rows - 1), sum == 0.0f ? -INFINITY : max + log2f(sum),
                             is_mine && d == 0);
      if (is_mine && d < p_.head_dim_vo) writer.store_8(d, columns);
    }
  }

  const AttentionParams& p_;
  const LogitRule& rule_;
  const Job& job_;
  NarrowStorage<C>& s_;
  const int first_row_;
  int all_begin_, all_end_;  // the keys that all see
  float max_[kRows / 4];      // in base 2
  float sum_[kRows / 4] = {};  // of this thread's weights
  float scores_[kRows / 2];
  unsigned keys_[C::kConverted ? 2 : 1][2][4], values_[C::kConverted ? 2 : 1][C::kPanelsVo][4];  // fragments of K and V
  float out_[C::kPanelsVo][kRows / 2] = {};
};

// The narrow warpgroup.
template <class C>
__device__ __forceinline__ void attend_narrow(const AttentionParams& p, const LogitRule& rule, NarrowStorage<C>& s) {
  SlotPosition<C> ring;
  read_jobs(s.jobs, [&](const Job& job) {
    for_each_row_tile<NarrowTile>(job, [&](const RowTile& rows) {
      if (job.num_rows - rows.row_begin <= 8)
        NarrowRows<C, 8>(p, rule, job, s, rows.row_begin).attend(rows.keys_begin, rows.keys_end, ring);
      else
        NarrowRows<C, 16>(p, rule, job, s, rows.row_begin).attend(rows.keys_begin, rows.keys_end, ring);
    });
  });
}

}  // namespace tilestream::cuda
