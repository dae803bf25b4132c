// The plan: one engine step's attention work as a stream of tiles, cut into jobs, dealt to workers.
//
// A *unit* is (one q tile of at most `tile_rows` rows of one request, or of one prefix group) x (kv head);
// its KV range is walked in tiles of `tile_keys` keys. The planner lays all units' tiles end to end and
// cuts the stream into one contiguous share per worker. A unit that is cut gives several jobs, whose
// partial results are merged by (output, log-sum-exp) in a fixed order.
//
// A kernel that runs jobs of few rows beside jobs of many on one SM takes two such streams: with `narrow_rows`, the
// units of at most so many rows are laid out and dealt on their own, to *narrow* lists of jobs, all others to *wide*
// ones. Kernels that know one kind only walk all lists, wide and narrow, and compute the same.
//
// A plan is one int32 buffer (host or device memory): PlanHeader, then the arrays it points into by
// offset. It holds no pointers, so it can be copied to a device as it is.
//
// Sources: stream-K decode, Lean Attention (2405.10480); shared-prefix jobs, BatchLLM (2412.03594);
// piggybacked decodes, SARATHI (2308.16369).
#pragma once

#include <cstdint>
#include <vector>

#include "tilestream/types.h"

namespace tilestream {

enum class PlanMode : int32_t {
  kBalanced = 0,        // cut where the even share falls; deterministic for a given batch
  kBatchInvariant = 1,  // cut only at multiples of split_tokens: a row's result never depends on the batch
};

// What does not change from step to step.
struct PlanConfig {
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  int32_t page_size;         // tokens: 16, 32 or 64
  int32_t num_workers;       // SMs or threads; lists of jobs of each kind
  int32_t tile_rows;         // most q rows (tokens x group_size) of one job; at least group_size
  int32_t tile_keys;         // KV tokens of one tile; a multiple of page_size, or 16 or 32 dividing it
  int32_t split_tokens;      // kBatchInvariant: multiple of tile_keys
  int32_t window_left;       // -1: off; otherwise a query sees keys at distance 0..window_left
  bool causal;               // bottom-right aligned
  PlanMode mode;
  // Cost of one tile of a job with r rows, in arbitrary units: cost_tile + cost_row * r.
  int32_t cost_tile;
  int32_t cost_row;
  // Most rows of a unit of the narrow lists; 0: no narrow lists. kBatchInvariant has none whatever this says: a row's
  // bits must not depend on which kind of list it is in.
  int32_t narrow_rows;
  bool merge_inside;  // merge_of_row and merge_counters are wanted
};

// One step's lengths. All arrays are host memory.
struct PlanInput {
  int32_t batch_size;
  const int32_t* cu_seqlens_q;  // [batch_size + 1]
  // [batch_size], or [batch_size, num_kv_heads] when lists_per_head: tokens in the page list, the step's
  // own included. Per-head lists (streaming or page-sparse heads) need window_left = -1; the last q_len tokens
  // of each are the step's own, and all earlier entries are visible to every query.
  const int32_t* kv_lens;
  bool lists_per_head;
  // Prefix groups: requests that share their first `group_prefix_tokens` KV tokens (same page ids). They need
  // causal and window_left = -1. kBatchInvariant shares only whole multiples of split_tokens.
  int32_t num_groups;
  const int32_t* group_indptr;         // [num_groups + 1]
  const int32_t* group_requests;       // request indices, each in at most one group
  const int32_t* group_prefix_tokens;  // [num_groups], multiple of page_size, <= kv_len - q_len of each member
};

// Job of the plan. Key j of the list (in list coordinates) is visible to the job's token i iff
// kv_begin <= j < kv_end and (not causal or j <= q_pos_begin + i) and (no window or
// j >= q_pos_begin + i - window_left).
struct PlanJob {
  int32_t q_rows_begin;   // into q_rows: token indices of the job's tokens
  int32_t num_q_tokens;
  int32_t kv_head;
  int32_t page_list;      // row of block_table ([batch_size, pages] or [batch_size * num_kv_heads, pages])
  int32_t kv_begin;       // first key of the job, a multiple of tile_keys from the unit's first tile
  int32_t kv_end;         // one past the last key; keys past it may be foreign memory
  int32_t q_pos_begin;    // list position of the first token; kAllVisible for a prefix job
  int32_t partial_begin;  // first partial row (one per token), or -1: the job writes the final output
};
constexpr int32_t kAllVisible = 1 << 30;

// Merge of the partial rows of one (token, kv head), in the order of `parts`.
struct PlanMerge {
  int32_t token;
  int32_t kv_head;
  int32_t parts_begin;  // into merge_parts: partial-row indices
  int32_t num_parts;    // 0: no visible key at all: out = 0, lse = -inf
};

struct PlanHeader {
  int32_t magic;  // kPlanMagic
  int32_t total_int32;  // size of the whole buffer
  int32_t batch_size, num_tokens;
  // num_workers: lists of jobs, of both kinds; of PlanConfig's when there are no narrow ones, else twice that.
  int32_t num_qo_heads, num_kv_heads, page_size, num_workers, tile_rows, tile_keys;
  int32_t causal, window_left, lists_per_head, num_groups, max_kv_len;
  int32_t num_jobs, num_merges, num_merge_parts, num_partial_rows, num_q_rows;
  // Offsets in int32 from the start of the buffer, all multiples of 4 (16 bytes).
  int32_t q_rows_offset;         // [num_q_rows]: 0..num_tokens-1, then the members of prefix units
  int32_t jobs_offset;           // [num_jobs] PlanJob, in stream order
  int32_t worker_begin_offset;   // [num_workers + 1]: worker w runs jobs worker_begin[w] .. worker_begin[w + 1]
  int32_t merges_offset;         // [num_merges] PlanMerge
  int32_t merge_parts_offset;    // [num_merge_parts]
  int32_t mode, cost_tile, cost_row;
  int32_t num_narrow_workers;    // the last lists, narrow: 0 or half of num_workers
  // 0: absent. For kernels that merge in the launch that computes the parts; PlanConfig::merge_inside asks for them.
  int32_t merge_of_row_offset;   // [num_partial_rows]: the merge that has the row as a part, or -1: its token sees no key
  int32_t merge_counters_offset;  // [num_merges * group_size]: zeros, see PlanView::merge_counters()
  int32_t reserved[1];
};
static_assert(sizeof(PlanHeader) == 32 * sizeof(int32_t));
constexpr int32_t kPlanMagic = 0x54535031;  // "TSP1"

// Typed view of a plan buffer.
struct PlanView {
  const int32_t* base;
  TILESTREAM_HOST_DEVICE const PlanHeader& header() const { return *reinterpret_cast<const PlanHeader*>(base); }
  TILESTREAM_HOST_DEVICE const int32_t* q_rows() const { return base + header().q_rows_offset; }
  TILESTREAM_HOST_DEVICE const PlanJob* jobs() const {
    return reinterpret_cast<const PlanJob*>(base + header().jobs_offset);
  }
  TILESTREAM_HOST_DEVICE const int32_t* worker_begin() const { return base + header().worker_begin_offset; }
  TILESTREAM_HOST_DEVICE const PlanMerge* merges() const {
    return reinterpret_cast<const PlanMerge*>(base + header().merges_offset);
  }
  TILESTREAM_HOST_DEVICE const int32_t* merge_parts() const { return base + header().merge_parts_offset; }
  TILESTREAM_HOST_DEVICE const int32_t* merge_of_row() const { return base + header().merge_of_row_offset; }
  // Counter [merge * group_size + head in the kv head's group]: how many of the merge's parts are written. A launch adds
  // one for each (a row of merge -1 is nobody's part); whoever makes it num_parts merges, and sets it to zero again for
  // the next launch. Merges of no parts are never counted to: a kernel writes those apart. Not const, since the
  // counters are the one thing that a launch changes, and nobody outside sees it: zeros before, zeros after. As the
  // workspace, they belong to one launch at a time.
  TILESTREAM_HOST_DEVICE int32_t* merge_counters() const {
    return const_cast<int32_t*>(base) + header().merge_counters_offset;
  }
};

// Floats of workspace an attention launch over this plan needs: per partial row, group_size x
// (head_dim_vo outputs + 1 lse).
TILESTREAM_HOST_DEVICE int64_t plan_workspace_floats(const PlanHeader& h, int64_t head_dim_vo) {
  return int64_t(h.num_partial_rows) * (h.num_qo_heads / h.num_kv_heads) * (head_dim_vo + 1);
}

// Builds plans. Keep one for as long as its configuration holds: it owns the scratch memory, so that planning
// allocates nothing in the steady state. Not for use by two threads at once.
class Planner {
 public:
  // Throws std::invalid_argument with the value and what is allowed, as prepare() does.
  explicit Planner(const PlanConfig& config);

  // Checks and measures a step; returns how many int32 write() needs at most. The arrays of `input` must
  // live until write() has returned.
  int64_t prepare(const PlanInput& input);
  // Most partial rows that the plan of the step prepared last can have: each is a part of one merge.
  int64_t max_partial_rows() const { return num_parts_bound_; }
  // Writes the plan of the step prepared last; returns its total_int32.
  int64_t write(int32_t* buffer);

  const PlanConfig& config() const { return config_; }

 private:
  struct Unit;
  // The units that are dealt together: all, or those of the wide lists, or those of the narrow ones.
  struct Stream {
    int64_t total_cost, max_tile_cost;
    int32_t max_unit_tokens;
  };
  struct GroupState { int32_t prefix_tokens, num_rows, num_q_tiles, rows_begin, first_unit; };
  struct Range { int32_t begin, end; };
  struct MergedUnit {
    int32_t token_begin, num_tokens, kv_head, q_pos_begin, group, group_row;
    Range jobs;
  };
  class JobWriter;

  bool is_narrow(int32_t num_q_tokens) const { return num_q_tokens <= narrow_tokens_; }
  int32_t prefix_unit(int32_t group, int32_t kv_head, int32_t group_row) const;
  void prepare_groups();
  void measure(const Unit& unit, int64_t times);
  template <class Wanted>
  Range wanted_tokens(int32_t num_tokens, Wanted&& wanted) const;
  template <class Wanted, class Visit>
  void visit_units(bool one_head_only, Wanted&& wanted, Visit&& visit) const;
  void write_q_rows(int32_t* q_rows) const;
  void write_units(JobWriter& writer);
  void write_merges(const PlanJob* jobs, int32_t* buffer, PlanHeader& header) const;
  void write_merge_info(int32_t* buffer, PlanHeader& header) const;

  PlanConfig config_;
  int32_t group_size_, tokens_per_tile_;
  int32_t narrow_tokens_;  // most tokens of a narrow unit
  int32_t num_lists_;      // of jobs, of both kinds
  PlanInput input_{};
  // Measured by prepare().
  int32_t num_tokens_ = 0, max_kv_len_ = 0;
  Stream streams_[2] = {};  // wide, narrow
  int64_t num_q_rows_ = 0, num_jobs_bound_ = 0, num_merges_bound_ = 0, num_parts_bound_ = 0;
  // Scratch, grown and never shrunk.
  std::vector<int32_t> group_of_request_, group_row_of_request_;
  std::vector<GroupState> groups_;
  std::vector<Range> prefix_jobs_;  // of each prefix unit
  std::vector<MergedUnit> merged_;
};

// Builds the plan into `buffer` (grown when too small, never shrunk). For a single plan: a caller that plans
// every step keeps a Planner.
void build_plan(const PlanConfig& config, const PlanInput& input, std::vector<int32_t>& buffer);

}  // namespace tilestream
