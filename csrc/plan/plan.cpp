// The planner: lays the units of a step end to end, cuts the stream into one share per worker, lists the merges.
//
// Stream order: prefix groups first, then requests; inside each kv head -> q tile -> kv tile, so that the q tiles
// that read the same K and V follow each other on one worker.
//
// Balanced mode cuts at the tile border nearest to each worker's even share, and at the unit's own border if that
// lies within half a tile: no useless one-tile parts, and every cut is at most half a tile off, so that no
// worker gets more than one tile's cost above the even share. Batch-invariant mode makes one job of every part
// between two multiples of split_tokens and deals whole jobs by the same nearest-border rule.
//
// With narrow lists there are two such streams, walked one after the other: wide units, then narrow ones.
#include "tilestream/plan.h"

#include <algorithm>
#include <climits>

#include "check.h"

namespace tilestream {

struct Planner::Unit {
  int32_t q_rows_begin, num_q_tokens, kv_head, page_list;
  int32_t kv_begin, kv_end;
  int32_t q_pos_begin;  // kAllVisible: a prefix unit
  int32_t group;        // -1, or the group whose prefix unit covers the keys before kv_begin
  int32_t group_row;    // the first token's place among the group's tokens
  bool is_prefix() const { return q_pos_begin == kAllVisible; }
  // Final output is written by merging, even when the unit is one job.
  bool always_merged() const { return is_prefix() || group >= 0; }
};

namespace {

int64_t align4(int64_t num_int32) { return round_up(num_int32, 4); }

int32_t num_parts(int32_t kv_begin, int32_t kv_end, int32_t split_tokens) {
  return kv_end > kv_begin ? (kv_end - 1) / split_tokens - kv_begin / split_tokens + 1 : 0;
}

// Appends the partial row of one token in jobs begin .. end of one unit, whose partial rows follow each other.
int32_t* append_parts(const PlanJob* jobs, int32_t begin, int32_t end, int32_t token, int32_t* part) {
  if (begin == end) return part;
  int32_t partial_row = jobs[begin].partial_begin + token;
  const int32_t step = jobs[begin].num_q_tokens;
  for (int32_t j = begin; j < end; ++j, partial_row += step) *part++ = partial_row;
  return part;
}

}  // namespace

// Emits the jobs of stream after stream, in stream order, and moves from worker to worker. Costs are counted in ticks,
// 1 / (2 * num_workers) of the configuration's unit: even shares and half tiles are whole numbers of ticks.
class Planner::JobWriter {
 public:
  JobWriter(const PlanConfig& config, PlanJob* jobs, int32_t* worker_begin)
      : config_(config),
        ticks_per_cost_(2 * int64_t(config.num_workers)),
        tiles_per_split_(config.split_tokens / config.tile_keys),
        jobs_(jobs),
        worker_begin_(worker_begin) {
    worker_begin_[0] = 0;
  }

  void begin_stream(const Stream& stream) {
    share_ticks_ = 2 * stream.total_cost;
    half_tile_ticks_ = stream.max_tile_cost * config_.num_workers;
    next_cut_ = config_.num_workers > 1 ? share_ticks_ : INT64_MAX;
    position_ = 0;
    worker_ = 0;
  }

  void end_stream() {
    while (worker_ < config_.num_workers) worker_begin_[++worker_] = num_jobs_;
    worker_begin_ += config_.num_workers;
  }

  // Both return whether the unit was cut into several jobs.
  bool add_balanced(const Unit& unit, int64_t tile_cost) {
    const int64_t tile_ticks = tile_cost * ticks_per_cost_;
    const int32_t tiles = int32_t(ceil_div(unit.kv_end - unit.kv_begin, config_.tile_keys));
    const int64_t begin = position_, end = begin + tiles * tile_ticks;
    // Half-way between two borders the unit's own wins, except that the first worker does not stay idle for it.
    const int64_t border_end = begin + half_tile_ticks_ + (begin > 0 ? 1 : 0);
    while (next_cut_ < border_end) next_worker(num_jobs_);
    const bool cut = next_cut_ < end - half_tile_ticks_;
    const bool partial = cut || unit.always_merged();
    int32_t job_begin = unit.kv_begin;
    while (next_cut_ < end - half_tile_ticks_) {
      const int64_t tile = (2 * (next_cut_ - begin) + tile_ticks) / (2 * tile_ticks);  // nearest; 1 .. tiles - 1
      const int32_t border = unit.kv_begin + int32_t(tile) * config_.tile_keys;
      if (border > job_begin) add_job(unit, job_begin, border, partial);
      job_begin = border;
      next_worker(num_jobs_);
    }
    add_job(unit, job_begin, unit.kv_end, partial);
    position_ = end;
    return cut;
  }

  bool add_invariant(const Unit& unit, int64_t tile_cost) {
    const int32_t split = config_.split_tokens, tile_keys = config_.tile_keys;
    const int64_t tile_ticks = tile_cost * ticks_per_cost_;
    const int64_t whole_part_ticks = tiles_per_split_ * tile_ticks;
    int32_t part_begin = unit.kv_begin;
    const int32_t first_border = part_begin == 0 ? split : (part_begin / split + 1) * split;  // a division saved, mostly
    int32_t part_end = std::min(first_border, unit.kv_end);
    const bool cut = part_end < unit.kv_end;
    const bool partial = cut || unit.always_merged();
    int32_t partial_begin = partial ? num_partial_rows_ : -1;
    // Where it stands in locals: the compiler cannot know that writing a job leaves the members as they are.
    PlanJob* job = jobs_ + num_jobs_;
    int64_t position = position_;
    while (part_begin < unit.kv_end) {
      const int32_t keys = part_end - part_begin;
      const int64_t ticks = keys == split ? whole_part_ticks : (keys + tile_keys - 1) / tile_keys * tile_ticks;
      while (next_cut_ < position + ticks / 2) next_worker(int32_t(job - jobs_));
      *job++ = job_of(unit, part_begin, part_end, partial_begin);
      if (partial) partial_begin += unit.num_q_tokens;
      position += ticks;
      part_begin = part_end;
      part_end = std::min(part_end + split, unit.kv_end);
    }
    if (partial) num_partial_rows_ = partial_begin;
    num_jobs_ = int32_t(job - jobs_);
    position_ = position;
    return cut;
  }

  int32_t num_jobs() const { return num_jobs_; }
  int32_t num_partial_rows() const { return num_partial_rows_; }

 private:
  static PlanJob job_of(const Unit& u, int32_t kv_begin, int32_t kv_end, int32_t partial_begin) {
    return {u.q_rows_begin, u.num_q_tokens, u.kv_head, u.page_list, kv_begin, kv_end, u.q_pos_begin, partial_begin};
  }

  void add_job(const Unit& unit, int32_t kv_begin, int32_t kv_end, bool partial) {
    jobs_[num_jobs_++] = job_of(unit, kv_begin, kv_end, partial ? num_partial_rows_ : -1);
    if (partial) num_partial_rows_ += unit.num_q_tokens;
  }

  // Cold, that is, kept out of the loops that call it: it runs once per worker, they once per job.
  [[gnu::cold]] void next_worker(int32_t first_job) {
    worker_begin_[++worker_] = first_job;
    next_cut_ = worker_ + 1 < config_.num_workers ? (worker_ + 1) * share_ticks_ : INT64_MAX;
  }

  const PlanConfig& config_;
  const int64_t ticks_per_cost_, tiles_per_split_;
  int32_t num_jobs_ = 0, num_partial_rows_ = 0;
  PlanJob* jobs_;
  // Of the stream.
  int64_t share_ticks_ = 0, half_tile_ticks_ = 0, next_cut_ = 0, position_ = 0;
  int32_t worker_ = 0;
  int32_t* worker_begin_;
};

Planner::Planner(const PlanConfig& config) : config_(config) {
  plan::check_config(config);
  group_size_ = config.num_qo_heads / config.num_kv_heads;
  tokens_per_tile_ = config.tile_rows / group_size_;
  const bool has_narrow = config.mode == PlanMode::kBalanced && config.narrow_rows > 0;
  narrow_tokens_ = has_narrow ? config.narrow_rows / group_size_ : 0;
  num_lists_ = config.num_workers * (has_narrow ? 2 : 1);
}

// The place in prefix_jobs_ of the unit that holds a row of a group's.
int32_t Planner::prefix_unit(int32_t group, int32_t kv_head, int32_t group_row) const {
  return groups_[group].first_unit + kv_head * groups_[group].num_q_tiles + group_row / tokens_per_tile_;
}

// Decides which groups get prefix units, and gives every request with tokens its rows there.
void Planner::prepare_groups() {
  const PlanInput& in = input_;
  groups_.resize(in.num_groups);
  group_row_of_request_.resize(in.batch_size);
  int64_t first_unit = 0;
  int64_t rows_begin = num_tokens_;
  for (int32_t g = 0; g < in.num_groups; ++g) {
    int32_t prefix = in.group_prefix_tokens[g];
    // Members' own parts must end where they would end without the group.
    if (config_.mode == PlanMode::kBatchInvariant) prefix -= prefix % config_.split_tokens;
    int32_t num_rows = 0, num_members = 0;
    for (int32_t m = in.group_indptr[g]; m < in.group_indptr[g + 1]; ++m) {
      const int32_t b = in.group_requests[m], q_len = in.cu_seqlens_q[b + 1] - in.cu_seqlens_q[b];
      group_row_of_request_[b] = num_rows;
      num_rows += q_len;
      num_members += q_len > 0;
    }
    if (num_members < 2) prefix = 0;  // nobody to share with
    if (prefix == 0) {
      for (int32_t m = in.group_indptr[g]; m < in.group_indptr[g + 1]; ++m) {
        group_of_request_[in.group_requests[m]] = -1;
      }
      num_rows = 0;
    }
    const int32_t num_q_tiles = int32_t(ceil_div(num_rows, tokens_per_tile_));
    groups_[g] = {prefix, num_rows, num_q_tiles, int32_t(rows_begin), int32_t(first_unit)};
    first_unit += int64_t(num_q_tiles) * config_.num_kv_heads;
    rows_begin += num_rows;
  }
  num_q_rows_ = rows_begin;
  prefix_jobs_.resize(first_unit);
}

// The tokens of a request or group that are in units of wanted heights: all its units but the last are full.
template <class Wanted>
Planner::Range Planner::wanted_tokens(int32_t num_tokens, Wanted&& wanted) const {
  const int32_t last = num_tokens > tokens_per_tile_ ? (num_tokens - 1) / tokens_per_tile_ * tokens_per_tile_ : 0;
  return {wanted(tokens_per_tile_) ? 0 : last, wanted(num_tokens - last) ? num_tokens : last};
}

// Calls visit(unit) in stream order, for the units whose wanted(num_q_tokens) is true. one_head_only: kv head 0 stands
// for all, where the heads share their lists.
template <class Wanted, class Visit>
void Planner::visit_units(bool one_head_only, Wanted&& wanted, Visit&& visit) const {
  const PlanInput& in = input_;
  const int32_t num_heads = one_head_only ? 1 : config_.num_kv_heads;
  const int32_t lists = in.lists_per_head ? config_.num_kv_heads : 1;
  for (int32_t g = 0; g < in.num_groups; ++g) {
    const GroupState& group = groups_[g];
    if (group.num_rows == 0) continue;
    const auto [rows_begin, rows_end] = wanted_tokens(group.num_rows, wanted);
    const int32_t first_list = in.group_requests[in.group_indptr[g]] * lists;
    for (int32_t h = 0; h < num_heads; ++h) {
      for (int32_t row = rows_begin; row < rows_end; row += tokens_per_tile_) {
        visit(Unit{group.rows_begin + row, std::min(tokens_per_tile_, group.num_rows - row), h,
                   lists > 1 ? first_list + h : first_list, 0, group.prefix_tokens, kAllVisible, g, row});
      }
    }
  }
  for (int32_t b = 0; b < in.batch_size; ++b) {
    const int32_t token_begin = in.cu_seqlens_q[b], q_len = in.cu_seqlens_q[b + 1] - token_begin;
    const auto [q_begin, q_end] = wanted_tokens(q_len, wanted);
    if (q_begin == q_end) continue;
    const int32_t group = group_of_request_[b];
    const int32_t group_row = group >= 0 ? group_row_of_request_[b] : 0;
    const int32_t own_begin = group >= 0 ? groups_[group].prefix_tokens : 0;
    for (int32_t h = 0; h < num_heads; ++h) {
      const int32_t list = lists > 1 ? b * lists + h : b;
      const int32_t kv_len = in.kv_lens[list];
      for (int32_t i = q_begin; i < q_end; i += tokens_per_tile_) {
        const int32_t num_q_tokens = std::min(tokens_per_tile_, q_len - i);
        const int32_t q_pos = kv_len - q_len + i;
        int32_t begin = own_begin;
        if (config_.window_left >= 0 && q_pos > config_.window_left) {
          begin = (q_pos - config_.window_left) / config_.tile_keys * config_.tile_keys;
        }
        const int32_t end = config_.causal ? q_pos + num_q_tokens : kv_len;
        visit(Unit{token_begin + i, num_q_tokens, h, list, begin, end, q_pos, group, group_row + i});
      }
    }
  }
}

// Adds a unit, present `times` times, to the totals.
void Planner::measure(const Unit& unit, int64_t times) {
  const int32_t keys = unit.kv_end - unit.kv_begin;
  if (keys == 0) {
    num_merges_bound_ += times * unit.num_q_tokens;
    return;
  }
  const int64_t tile_cost = config_.cost_tile + int64_t(config_.cost_row) * unit.num_q_tokens * group_size_;
  Stream& stream = streams_[is_narrow(unit.num_q_tokens)];
  stream.total_cost += times * tile_cost * ceil_div(keys, config_.tile_keys);
  if (stream.total_cost > (int64_t(1) << 60) / config_.num_workers) {
    plan::reject("the step's tiles cost more than 2^60 / num_workers in all, which does not fit the planner's "
                 "integers: use smaller cost_tile = ", config_.cost_tile, " and cost_row = ", config_.cost_row);
  }
  stream.max_tile_cost = std::max(stream.max_tile_cost, tile_cost);
  stream.max_unit_tokens = std::max(stream.max_unit_tokens, unit.num_q_tokens);
  const int64_t rows = times * unit.num_q_tokens;
  if (config_.mode == PlanMode::kBalanced) {
    num_jobs_bound_ += times;  // and one for each cut, added at the end
    if (!unit.always_merged()) return;
    num_parts_bound_ += rows;
    num_merges_bound_ += unit.is_prefix() ? 0 : rows;
  } else {
    const int64_t parts = num_parts(unit.kv_begin, unit.kv_end, config_.split_tokens);
    num_jobs_bound_ += times * parts;
    if (parts == 1 && !unit.always_merged()) return;
    num_parts_bound_ += rows * parts;
    num_merges_bound_ += unit.is_prefix() ? 0 : rows;
  }
}

int64_t Planner::prepare(const PlanInput& input) {
  plan::check_input(config_, input, group_of_request_);
  input_ = input;
  num_tokens_ = input.cu_seqlens_q[input.batch_size];
  const int64_t num_lists = int64_t(input.batch_size) * (input.lists_per_head ? config_.num_kv_heads : 1);
  max_kv_len_ = num_lists > 0 ? *std::max_element(input.kv_lens, input.kv_lens + num_lists) : 0;
  streams_[0] = streams_[1] = {};
  num_jobs_bound_ = num_merges_bound_ = num_parts_bound_ = 0;
  prepare_groups();
  const bool heads_alike = !input.lists_per_head;
  const auto all = [](int32_t) { return true; };
  visit_units(heads_alike, all, [&](const Unit& unit) { measure(unit, heads_alike ? config_.num_kv_heads : 1); });
  if (config_.mode == PlanMode::kBalanced) {
    // A cut adds a job; it makes a merge of each token of its unit, with at most two parts more.
    const int64_t cuts = config_.num_workers - 1;
    for (const Stream& stream : streams_) {
      if (stream.max_unit_tokens == 0) continue;
      num_jobs_bound_ += cuts;
      num_merges_bound_ += cuts * stream.max_unit_tokens;
      num_parts_bound_ += 2 * cuts * stream.max_unit_tokens;
    }
  }
  int64_t bound = int64_t(sizeof(PlanHeader) / sizeof(int32_t)) + align4(num_q_rows_) + align4(num_lists_ + 1) +
                  num_jobs_bound_ * int64_t(sizeof(PlanJob) / sizeof(int32_t)) +
                  num_merges_bound_ * int64_t(sizeof(PlanMerge) / sizeof(int32_t)) + align4(num_parts_bound_);
  if (config_.merge_inside) bound += align4(num_parts_bound_) + align4(num_merges_bound_ * group_size_);
  if (bound > INT32_MAX) {
    plan::reject("the plan of this step needs up to ", bound, " int32, more than the ", INT32_MAX,
                 " that its offsets can address: give it fewer tokens, larger tile_rows or larger split_tokens");
  }
  return bound;
}

void Planner::write_q_rows(int32_t* q_rows) const {
  for (int32_t t = 0; t < num_tokens_; ++t) q_rows[t] = t;
  for (int32_t g = 0; g < input_.num_groups; ++g) {
    if (groups_[g].num_rows == 0) continue;
    int32_t* row = q_rows + groups_[g].rows_begin;
    for (int32_t m = input_.group_indptr[g]; m < input_.group_indptr[g + 1]; ++m) {
      const int32_t b = input_.group_requests[m];
      for (int32_t t = input_.cu_seqlens_q[b]; t < input_.cu_seqlens_q[b + 1]; ++t) *row++ = t;
    }
  }
}

void Planner::write_units(JobWriter& writer) {
  merged_.clear();
  const bool balanced = config_.mode == PlanMode::kBalanced;
  for (int32_t kind = 0; kind * config_.num_workers < num_lists_; ++kind) {
    writer.begin_stream(streams_[kind]);
    const auto wanted = [&](int32_t num_q_tokens) { return is_narrow(num_q_tokens) == (kind == 1); };
    visit_units(false, wanted, [&](const Unit& unit) {
      const int32_t first_job = writer.num_jobs();
      bool cut = false;
      if (unit.kv_end > unit.kv_begin) {
        const int64_t tile_cost = config_.cost_tile + int64_t(config_.cost_row) * unit.num_q_tokens * group_size_;
        cut = balanced ? writer.add_balanced(unit, tile_cost) : writer.add_invariant(unit, tile_cost);
      }
      const Range jobs{first_job, writer.num_jobs()};
      if (unit.is_prefix()) {
        prefix_jobs_[prefix_unit(unit.group, unit.kv_head, unit.group_row)] = jobs;
      } else if (cut || unit.always_merged() || unit.kv_end == unit.kv_begin) {
        merged_.push_back({unit.q_rows_begin, unit.num_q_tokens, unit.kv_head, unit.q_pos_begin, unit.group,
                           unit.group_row, jobs});
      }
    });
    writer.end_stream();
  }
}

// A token's parts: those of its prefix unit, then those of its own, each by rising kv. Parts in which the token sees
// no key are left out.
void Planner::write_merges(const PlanJob* jobs, int32_t* buffer, PlanHeader& header) const {
  for (const MergedUnit& unit : merged_) header.num_merges += unit.num_tokens;
  PlanMerge* merge = reinterpret_cast<PlanMerge*>(buffer + header.merges_offset);
  header.merge_parts_offset = header.merges_offset + header.num_merges * int32_t(sizeof(PlanMerge) / sizeof(int32_t));
  int32_t* const parts = buffer + header.merge_parts_offset;
  int32_t* part = parts;
  for (const MergedUnit& unit : merged_) {
    for (int32_t i = 0; i < unit.num_tokens; ++i) {
      int32_t* const first_part = part;
      if (unit.group >= 0) {
        const int32_t row = unit.group_row + i;
        const Range prefix = prefix_jobs_[prefix_unit(unit.group, unit.kv_head, row)];
        part = append_parts(jobs, prefix.begin, prefix.end, row % tokens_per_tile_, part);
      }
      const int32_t q_pos = unit.q_pos_begin + i;
      auto [begin, end] = unit.jobs;
      // A lone token sees keys of all its unit's jobs.
      if (unit.num_tokens > 1 && config_.window_left >= 0) {
        while (begin < end && jobs[begin].kv_end <= q_pos - config_.window_left) ++begin;
      }
      if (unit.num_tokens > 1 && config_.causal) {
        while (begin < end && jobs[end - 1].kv_begin > q_pos) --end;
      }
      part = append_parts(jobs, begin, end, i, part);
      *merge++ = {unit.token_begin + i, unit.kv_head, int32_t(first_part - parts), int32_t(part - first_part)};
    }
  }
  header.num_merge_parts = int32_t(part - parts);
  while ((part - parts) % 4 != 0) *part++ = 0;
  header.total_int32 = int32_t(part - buffer);
}

// What a kernel that merges inside its launch asks of a part, behind all else.
void Planner::write_merge_info(int32_t* buffer, PlanHeader& header) const {
  const PlanView plan{buffer};
  header.merge_of_row_offset = header.total_int32;
  header.merge_counters_offset = header.merge_of_row_offset + int32_t(align4(header.num_partial_rows));
  header.total_int32 = header.merge_counters_offset + int32_t(align4(int64_t(header.num_merges) * group_size_));
  int32_t* const merge_of_row = buffer + header.merge_of_row_offset;
  std::fill(merge_of_row, buffer + header.merge_counters_offset, -1);
  for (int32_t m = 0; m < header.num_merges; ++m) {
    const PlanMerge& merge = plan.merges()[m];
    const int32_t* const parts = plan.merge_parts() + merge.parts_begin;
    for (int32_t i = 0; i < merge.num_parts; ++i) merge_of_row[parts[i]] = m;
  }
  std::fill(buffer + header.merge_counters_offset, buffer + header.total_int32, 0);
}

int64_t Planner::write(int32_t* buffer) {
  PlanHeader& header = *reinterpret_cast<PlanHeader*>(buffer);
  header = {};
  header.magic = kPlanMagic;
  header.batch_size = input_.batch_size;
  header.num_tokens = num_tokens_;
  header.num_qo_heads = config_.num_qo_heads;
  header.num_kv_heads = config_.num_kv_heads;
  header.page_size = config_.page_size;
  header.num_workers = num_lists_;
  header.num_narrow_workers = num_lists_ - config_.num_workers;
  header.tile_rows = config_.tile_rows;
  header.tile_keys = config_.tile_keys;
  header.causal = config_.causal;
  header.window_left = config_.window_left;
  header.lists_per_head = input_.lists_per_head;
  header.num_groups = input_.num_groups;
  header.max_kv_len = max_kv_len_;
  header.mode = int32_t(config_.mode);
  header.cost_tile = config_.cost_tile;
  header.cost_row = config_.cost_row;
  header.num_q_rows = int32_t(num_q_rows_);
  header.q_rows_offset = int32_t(sizeof(PlanHeader) / sizeof(int32_t));
  header.worker_begin_offset = header.q_rows_offset + int32_t(align4(num_q_rows_));
  header.jobs_offset = header.worker_begin_offset + int32_t(align4(num_lists_ + 1));

  std::fill(buffer + header.q_rows_offset, buffer + header.jobs_offset, 0);  // the padding between arrays too
  write_q_rows(buffer + header.q_rows_offset);
  PlanJob* jobs = reinterpret_cast<PlanJob*>(buffer + header.jobs_offset);
  JobWriter writer(config_, jobs, buffer + header.worker_begin_offset);
  write_units(writer);
  header.num_jobs = writer.num_jobs();
  header.num_partial_rows = writer.num_partial_rows();
  header.merges_offset = header.jobs_offset + header.num_jobs * int32_t(sizeof(PlanJob) / sizeof(int32_t));
  write_merges(jobs, buffer, header);
  if (config_.merge_inside) write_merge_info(buffer, header);
  return header.total_int32;
}

void build_plan(const PlanConfig& config, const PlanInput& input, std::vector<int32_t>& buffer) {
  Planner planner(config);
  const int64_t num_int32 = planner.prepare(input);
  if (int64_t(buffer.size()) < num_int32) buffer.resize(num_int32);
  planner.write(buffer.data());
}

}  // namespace tilestream
