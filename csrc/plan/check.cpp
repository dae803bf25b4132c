#include "check.h"

namespace tilestream::plan {
namespace {

// Keep costs x workers inside 64 bits, and every count inside 32: far above any real machine.
constexpr int32_t kMaxWorkers = 1 << 16;
constexpr int32_t kMaxTileRows = 1 << 16;
constexpr int32_t kMaxTileKeys = 1 << 16;
constexpr int32_t kMaxCost = 1 << 16;

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    reject(name, " = ", value, " is out of range: allowed are ", least, " to ", most);
  }
}

int32_t kv_len_of(const PlanConfig& config, const PlanInput& input, int32_t request, int32_t kv_head) {
  return input.lists_per_head ? input.kv_lens[int64_t(request) * config.num_kv_heads + kv_head]
                              : input.kv_lens[request];
}

void check_cu_seqlens(const PlanInput& input) {
  if (input.cu_seqlens_q[0] != 0) reject("cu_seqlens_q[0] = ", input.cu_seqlens_q[0], " must be 0");
  for (int32_t b = 0; b < input.batch_size; ++b) {
    if (input.cu_seqlens_q[b + 1] < input.cu_seqlens_q[b]) {
      reject("cu_seqlens_q must not fall, got cu_seqlens_q[", b, "] = ", input.cu_seqlens_q[b], " and cu_seqlens_q[",
             b + 1, "] = ", input.cu_seqlens_q[b + 1]);
    }
  }
}

void check_kv_lens(const PlanConfig& config, const PlanInput& input) {
  const int32_t lists = input.lists_per_head ? config.num_kv_heads : 1;
  for (int32_t b = 0; b < input.batch_size; ++b) {
    const int32_t q_len = input.cu_seqlens_q[b + 1] - input.cu_seqlens_q[b];
    for (int32_t h = 0; h < lists; ++h) {
      const int32_t kv_len = input.kv_lens[int64_t(b) * lists + h];
      const bool in_range = kv_len >= 0 && kv_len < kAllVisible;
      if (in_range && (!config.causal || kv_len >= q_len)) continue;
      std::ostringstream name;
      name << "kv_lens[" << b;
      if (input.lists_per_head) name << ", " << h;
      name << "] = " << kv_len;
      if (!in_range) reject(name.str(), " is out of range: allowed are 0 to ", kAllVisible - 1, " tokens");
      reject(name.str(), " is less than the request's ", q_len, " query tokens (cu_seqlens_q); with causal on, a list "
             "holds the step's own tokens, so at least ", q_len, " is needed");
    }
  }
}

void check_group(const PlanConfig& config, const PlanInput& input, int32_t group, std::vector<int32_t>& group_of) {
  const int32_t prefix = input.group_prefix_tokens[group];
  if (prefix < 0 || prefix % config.page_size != 0) {
    reject("prefix_tokens = ", prefix, " of group ", group, " must be a non-negative multiple of page_size = ",
           config.page_size);
  }
  for (int32_t m = input.group_indptr[group]; m < input.group_indptr[group + 1]; ++m) {
    const int32_t b = input.group_requests[m];
    if (b < 0 || b >= input.batch_size) {
      reject("group ", group, " names request ", b, ", but the batch has requests 0 to ", input.batch_size - 1);
    }
    if (group_of[b] != -1) {
      reject("request ", b, " is named in group ", group_of[b], " and again in group ", group,
             "; a request may be in one group, once");
    }
    group_of[b] = group;
    const int32_t q_len = input.cu_seqlens_q[b + 1] - input.cu_seqlens_q[b];
    for (int32_t h = 0; h < (input.lists_per_head ? config.num_kv_heads : 1); ++h) {
      const int32_t kv_len = kv_len_of(config, input, b, h);
      if (prefix > kv_len - q_len) {
        reject("prefix_tokens = ", prefix, " of group ", group, " is more than the ", kv_len - q_len,
               " tokens that request ", b, " has before its ", q_len, " query tokens (kv_len ", kv_len, ")");
      }
    }
  }
}

}  // namespace

void check_config(const PlanConfig& c) {
  check_range("num_qo_heads", c.num_qo_heads, 1, 1 << 16);
  check_range("num_kv_heads", c.num_kv_heads, 1, c.num_qo_heads);
  if (c.num_qo_heads % c.num_kv_heads != 0) {
    reject("num_qo_heads = ", c.num_qo_heads, " must be a multiple of num_kv_heads = ", c.num_kv_heads);
  }
  if (c.page_size != 16 && c.page_size != 32 && c.page_size != 64) {
    reject("page_size = ", c.page_size, " is not supported: allowed are 16, 32 and 64 tokens");
  }
  check_range("num_workers", c.num_workers, 1, kMaxWorkers);
  check_range("tile_rows", c.tile_rows, c.num_qo_heads / c.num_kv_heads, kMaxTileRows);
  const bool whole_pages = c.tile_keys > 0 && c.tile_keys % c.page_size == 0;
  const bool page_part = c.tile_keys > 0 && c.page_size % c.tile_keys == 0 && c.tile_keys % kKvBlockTokens == 0;
  if (!whole_pages && !page_part) {
    reject("tile_keys = ", c.tile_keys, " must be a multiple of page_size = ", c.page_size,
           ", or a divisor of it and a multiple of ", kKvBlockTokens);
  }
  if (c.mode != PlanMode::kBalanced && c.mode != PlanMode::kBatchInvariant) {
    reject("mode = ", int32_t(c.mode), " is unknown: allowed are 0 (balanced) and 1 (batch-invariant)");
  }
  check_range("tile_keys", c.tile_keys, 1, kMaxTileKeys);
  if (c.mode == PlanMode::kBatchInvariant) {
    check_range("split_tokens", c.split_tokens, c.tile_keys, kAllVisible - 1);
    if (c.split_tokens % c.tile_keys != 0) {
      reject("split_tokens = ", c.split_tokens, " must be a multiple of tile_keys = ", c.tile_keys);
    }
  }
  check_range("window_left", c.window_left, -1, kAllVisible - 1);
  check_range("cost_tile", c.cost_tile, 0, kMaxCost);
  check_range("cost_row", c.cost_row, 0, kMaxCost);
  check_range("narrow_rows", c.narrow_rows, 0, kMaxTileRows);
  if (c.cost_tile + c.cost_row == 0) reject("cost_tile and cost_row are both 0: a tile must cost something");
}

void check_input(const PlanConfig& config, const PlanInput& input, std::vector<int32_t>& group_of_request) {
  check_range("batch_size", input.batch_size, 0, INT32_MAX / config.num_kv_heads);
  check_cu_seqlens(input);
  check_kv_lens(config, input);
  if (input.lists_per_head && config.window_left != -1) {
    reject("window_left = ", config.window_left, " cannot be used with a page list per kv head: such a list already "
           "holds only what its head sees; pass -1");
  }
  group_of_request.assign(input.batch_size, -1);
  check_range("num_groups", input.num_groups, 0, INT32_MAX);
  if (input.num_groups == 0) return;
  if (!config.causal || config.window_left != -1) {
    reject("prefix groups need causal on and window_left = -1, got causal ", config.causal ? "on" : "off",
           " and window_left = ", config.window_left);
  }
  if (input.group_indptr[0] != 0) reject("group_indptr[0] = ", input.group_indptr[0], " must be 0");
  for (int32_t g = 0; g < input.num_groups; ++g) {
    if (input.group_indptr[g + 1] < input.group_indptr[g]) {
      reject("group_indptr must not fall, got group_indptr[", g, "] = ", input.group_indptr[g], " and group_indptr[",
             g + 1, "] = ", input.group_indptr[g + 1]);
    }
    check_group(config, input, g, group_of_request);
  }
}

}  // namespace tilestream::plan
