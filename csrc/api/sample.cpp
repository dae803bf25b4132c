// tilestream::sample: tensors -> checks -> params -> backend.
#include "tilestream/sample.h"

#include <torch/library.h>

#include <cmath>

#include "api/checks.h"
#include "api/launch.h"
#include "api/one_device.h"
#include "api/sampling.h"

namespace tilestream::api {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void fill_penalties(SampleParams& p, const OptionalTensor& repetition, const OptionalTensor& presence,
                    const OptionalTensor& frequency, const OptionalTensor& history, const OptionalTensor& indptr,
                    const OptionalTensor& prompt_len) {
  const int given = repetition.has_value() + presence.has_value() + frequency.has_value() + history.has_value() +
                    indptr.has_value() + prompt_len.has_value();
  TORCH_CHECK_VALUE(given == 0 || given == 6, "penalties: ", given,
                    " of repetition_penalty, presence_penalty, frequency_penalty, history, history_indptr, history_prompt_len "
                    "are given; give all or none");
  if (given == 0) return;
  const int64_t b = p.batch_size;
  p.repetition_penalty = per_row<float>(*repetition, "repetition_penalty", at::kFloat, b);
  check_values(*repetition, "repetition_penalty", 0, HUGE_VALF, true);
  p.presence_penalty = per_row<float>(*presence, "presence_penalty", at::kFloat, b);
  p.frequency_penalty = per_row<float>(*frequency, "frequency_penalty", at::kFloat, b);
  p.history_prompt_len = per_row<int32_t>(*prompt_len, "history_prompt_len", at::kInt, b);
  p.history_indptr = per_row<int32_t>(*indptr, "history_indptr", at::kInt, b + 1);
  check_tensor(*history, "history", {at::kInt}, 1);
  p.history = history->const_data_ptr<int32_t>();
  check_range(*history, p.history, history->size(0), "history", 0, p.vocab_size);
  for (int64_t i = 0; indptr->is_cpu() && i <= b; ++i) {
    const int64_t low = i == 0 ? 0 : p.history_indptr[i - 1];
    TORCH_CHECK_VALUE(
        p.history_indptr[i] >= low && p.history_indptr[i] <= history->size(0) && (i > 0 || p.history_indptr[0] == 0),
        "history_indptr[", i, "] is ", p.history_indptr[i], "; it must start at 0, not fall, and end within history of ",
        history->size(0));
  }
}

void sample(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k, const at::Tensor& top_p,
            const at::Tensor& min_p, const at::Tensor& seeds, const at::Tensor& positions,
            const OptionalTensor& repetition_penalty, const OptionalTensor& presence_penalty,
            const OptionalTensor& frequency_penalty, const OptionalTensor& history, const OptionalTensor& history_indptr,
            const OptionalTensor& history_prompt_len, const at::Tensor& tokens, const OptionalTensor& logprobs,
            const at::Tensor& top_ids, const at::Tensor& top_logprobs) {
  check_tensor(logits, "logits", {at::kFloat}, 2);
  SampleParams p{};
  const int64_t b = p.batch_size = logits.size(0);
  p.vocab_size = logits.size(1);
  TORCH_CHECK_VALUE(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "logits has shape ", logits.sizes(),
                    "; allowed vocabularies: 1 to ", kMaxVocabSize);
  p.logits = logits.const_data_ptr<float>();
  p.logits_row_stride = logits.stride(0);
  p.temperature = per_row<float>(temperature, "temperature", at::kFloat, b);
  check_values(temperature, "temperature", 0, HUGE_VALF, false);
  p.top_k = per_row<int32_t>(top_k, "top_k", at::kInt, b);
  check_range(top_k, p.top_k, b, "top_k", 0, int64_t(1) << 31);
  p.top_p = per_row<float>(top_p, "top_p", at::kFloat, b);
  check_values(top_p, "top_p", 0, 1, true);
  p.min_p = per_row<float>(min_p, "min_p", at::kFloat, b);
  check_values(min_p, "min_p", 0, 1, false);
  p.seeds = per_row<int64_t>(seeds, "seeds", at::kLong, b);
  p.positions = per_row<int64_t>(positions, "positions", at::kLong, b);
  fill_penalties(p, repetition_penalty, presence_penalty, frequency_penalty, history, history_indptr, history_prompt_len);
  per_row<int64_t>(tokens, "tokens", at::kLong, b);
  if (logprobs.has_value()) per_row<float>(*logprobs, "logprobs", at::kFloat, b);
  check_tensor(top_ids, "top_ids", {at::kLong}, 2);
  check_tensor(top_logprobs, "top_logprobs", {at::kFloat}, 2);
  check_contiguous(top_ids, "top_ids");
  check_contiguous(top_logprobs, "top_logprobs");
  check_size(top_ids, "top_ids", 0, b, "batch_size");
  check_size(top_logprobs, "top_logprobs", 0, b, "batch_size");
  check_size(top_logprobs, "top_logprobs", 1, top_ids.size(1), "as top_ids");
  TORCH_CHECK_VALUE(top_ids.size(1) <= 64 && top_ids.size(1) <= p.vocab_size, "top_ids asks for ", top_ids.size(1),
                    " logprobs; allowed: up to 64 and the vocabulary's ", p.vocab_size);
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.logprobs = optional_data<float>(logprobs);
  p.num_top_logprobs = int32_t(top_ids.size(1));
  p.top_ids = top_ids.mutable_data_ptr<int64_t>();
  p.top_logprobs = top_logprobs.mutable_data_ptr<float>();
  launch(logits, cpu::sample, cuda::sample, p);
}

void implement(torch::Library& m) {
  impl<"sample", sample>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions, "
      "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, Tensor? history, Tensor? history_indptr, "
      "Tensor? history_prompt_len, Tensor(a!) tokens, Tensor(b!)? logprobs, Tensor(c!) top_ids, Tensor(d!) top_logprobs) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
