// All-reduce with norm over the ranks of a group: tensors -> checks -> params -> backend.
#include "tilestream/allreduce.h"

#include <torch/library.h>

#include "api/checks.h"
#include "api/launch.h"
#include "api/one_device.h"
#include "api/quantised_rows.h"

namespace tilestream::api {
namespace {

constexpr int64_t kNumFields = 5;  // of host_ranks before the addresses

struct Group {
  Ranks ranks;
  int64_t block_bytes;
};

Group check_ranks(const at::Tensor& host_ranks, int64_t channel) {
  check_tensor(host_ranks, "host_ranks", {at::kLong}, 1);
  TORCH_CHECK_VALUE(host_ranks.is_cpu(), "host_ranks is on ", host_ranks.device(), "; it must be on cpu");
  TORCH_CHECK_VALUE(host_ranks.size(0) > kNumFields && host_ranks.size(0) <= kNumFields + kMaxRanks, "host_ranks has shape ",
                    host_ranks.sizes(), "; it needs ", kNumFields, " numbers and the addresses of 1 to ", kMaxRanks, " ranks");
  const int64_t* const fields = host_ranks.const_data_ptr<int64_t>();
  const int64_t rank = fields[0], world_size = fields[1], multicast = fields[2], timeout_ms = fields[3];
  TORCH_CHECK_VALUE(world_size == host_ranks.size(0) - kNumFields, "host_ranks names a world_size of ", world_size, " but ",
                    host_ranks.size(0) - kNumFields, " addresses");
  TORCH_CHECK_VALUE(rank >= 0 && rank < world_size, "rank is ", rank, "; allowed: 0 to ", world_size - 1);
  TORCH_CHECK_VALUE(timeout_ms >= 1 && timeout_ms <= INT32_MAX, "timeout_ms is ", timeout_ms, "; allowed: 1 to ", INT32_MAX);
  TORCH_CHECK_VALUE(fields[4] >= kSignalBytes, "a rank's block has ", fields[4], " bytes; it needs at least ", kSignalBytes);
  TORCH_CHECK_VALUE(channel >= 0 && channel < kChannels, "channel is ", channel, "; allowed: 0 to ", kChannels - 1);
  Group group{};
  group.ranks.rank = int32_t(rank), group.ranks.world_size = int32_t(world_size);
  group.ranks.channel = int32_t(channel), group.ranks.timeout_ms = int32_t(timeout_ms);
  group.ranks.multicast = reinterpret_cast<unsigned char*>(multicast);
  for (int r = 0; r < world_size; ++r) {
    TORCH_CHECK_VALUE(fields[kNumFields + r] != 0, "the address of rank ", r, "'s block is 0");
    group.ranks.memory[r] = reinterpret_cast<unsigned char*>(fields[kNumFields + r]);
  }
  group.block_bytes = fields[4];
  return group;
}

// Where `t` lies in this rank's block.
int64_t offset_in(const Group& group, const at::Tensor& t, const char* name) {
  const int64_t offset = static_cast<const unsigned char*>(t.const_data_ptr()) - group.ranks.memory[group.ranks.rank];
  TORCH_CHECK_VALUE(offset >= kSignalBytes && offset + int64_t(t.nbytes()) <= group.block_bytes, name, " is at byte ", offset,
                    " of this rank's block; allowed: from ", kSignalBytes, ", where the signals end, to ", group.block_bytes,
                    " less its ", t.nbytes(), " bytes");
  return offset;
}

void allreduce_rmsnorm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& q, const std::optional<at::Tensor>& scale,
                       const std::optional<at::Tensor>& sum, const at::Tensor& host_ranks, double eps, int64_t channel) {
  const Group group = check_ranks(host_ranks, channel);
  check_tensor(x, "x", kFloatTypes, 2);
  check_contiguous(x, "x");
  AllReduceRmsNormParams p{};
  p.ranks = group.ranks;
  p.num_tokens = x.size(0), p.hidden = x.size(1);
  p.dtype = dtype_of(x);
  p.eps = float(eps);
  if (p.num_tokens == 0) return;
  p.x = offset_in(group, x, "x");
  TORCH_CHECK_VALUE(p.x % 16 == 0, "x is at byte ", p.x, " of this rank's block; it must be a multiple of 16");
  if (weight.has_value()) {
    check_tensor(*weight, "weight", {at::kFloat}, 1);
    check_size(*weight, "weight", 0, p.hidden, "the last dimension of x");
    p.weight = weight->const_data_ptr<float>();
  }
  if (residual.has_value()) {
    TORCH_CHECK_VALUE(weight.has_value(), "there is a residual but no weight; a plain all-reduce has neither");
    check_tensor(*residual, "residual", kFloatTypes, 2);
    check_same_dtype(*residual, "residual", x, "x");
    TORCH_CHECK_VALUE(residual->sizes() == x.sizes(), "residual has shape ", residual->sizes(), "; it must be that of x, ",
                      x.sizes());
    p.residual = residual->mutable_data_ptr();
    p.residual_row_stride = residual->stride(0);
  }
  p.q = -1;
  TORCH_CHECK_VALUE(q.has_value() == scale.has_value() && q.has_value() == sum.has_value(),
                    "of q, scale and sum some are None; give all three or none");
  if (q.has_value()) {
    TORCH_CHECK_VALUE(weight.has_value(), "there is a q but no weight; a plain all-reduce has neither");
    p.k4 = check_quantised(*q, *scale, *sum, p.num_tokens, p.hidden).k4;
    p.q = offset_in(group, *q, "q"), p.scale = offset_in(group, *scale, "scale"), p.sum = offset_in(group, *sum, "sum");
  }
  launch(x, cpu::allreduce_rmsnorm, cuda::allreduce_rmsnorm, p);
}

void implement(torch::Library& m) { impl<"allreduce_rmsnorm", allreduce_rmsnorm>(m); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def(
      "allreduce_rmsnorm(Tensor(a!) x, Tensor(b!)? residual, Tensor? weight, Tensor(c!)? q, Tensor(d!)? scale, Tensor(e!)? sum, "
      "Tensor host_ranks, *, float eps, int channel=0) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
