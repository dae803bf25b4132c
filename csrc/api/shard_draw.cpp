// tilestream::shard_histogram, shard_masses, shard_draw: tensors -> checks -> params -> backend.
#include "tilestream/shard_draw.h"

#include <torch/library.h>

#include <cmath>

#include "api/checks.h"
#include "api/launch.h"
#include "api/one_device.h"
#include "api/sampling.h"

namespace tilestream::api {
namespace {

// Sums of masses are uint64; torch, which does little with those, has them as int64 of the same bits.
uint64_t* masses_of(const at::Tensor& t, const char* name, int64_t ndim) {
  check_tensor(t, name, {at::kLong}, ndim);
  check_contiguous(t, name);
  return reinterpret_cast<uint64_t*>(t.mutable_data_ptr<int64_t>());
}

ShardDrawParams rows_of(const at::Tensor& logits, const at::Tensor& maxima, const at::Tensor& temperature,
                        const at::Tensor& top_p, const at::Tensor& histograms) {
  check_tensor(logits, "logits", {at::kFloat}, 2);
  ShardDrawParams p{};
  const int64_t b = p.batch_size = logits.size(0);
  p.vocab_size = logits.size(1);
  TORCH_CHECK_VALUE(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "logits has shape ", logits.sizes(),
                    "; allowed: 1 to ", kMaxVocabSize, " tokens");
  p.logits = logits.const_data_ptr<float>();
  p.logits_row_stride = logits.stride(0);
  p.maxima = per_row<float>(maxima, "maxima", at::kFloat, b);
  p.temperature = per_row<float>(temperature, "temperature", at::kFloat, b);
  check_values(temperature, "temperature", 0, HUGE_VALF, false);
  p.top_p = per_row<float>(top_p, "top_p", at::kFloat, b);
  check_values(top_p, "top_p", 0, 1, true);
  p.histograms = masses_of(histograms, "histograms", 3);
  p.num_rounds = int32_t(histograms.size(0));
  p.num_top_p = histograms.size(1);
  TORCH_CHECK_VALUE(p.num_top_p <= b, "histograms has shape ", histograms.sizes(), ", but logits only ", b, " rows");
  check_size(histograms, "histograms", 2, kHistogramBins, "bins");
  return p;
}

void fill_filters(ShardDrawParams& p, const at::Tensor& min_p, const at::Tensor& histograms, const at::Tensor& chunk_masses) {
  check_size(histograms, "histograms", 0, kHistogramRounds, "rounds");
  p.min_p = per_row<float>(min_p, "min_p", at::kFloat, p.batch_size);
  check_values(min_p, "min_p", 0, 1, false);
  p.chunk_masses = masses_of(chunk_masses, "chunk_masses", 2);
  check_size(chunk_masses, "chunk_masses", 0, p.batch_size, "batch_size, rows of logits");
  check_size(chunk_masses, "chunk_masses", 1, ceil_div(p.vocab_size, kMassChunk), "one per 1,024 tokens");
}

void shard_histogram(const at::Tensor& logits, const at::Tensor& maxima, const at::Tensor& temperature, const at::Tensor& top_p,
                     const at::Tensor& histograms, const at::Tensor& histogram) {
  ShardDrawParams p = rows_of(logits, maxima, temperature, top_p, histograms);
  TORCH_CHECK_VALUE(p.num_rounds < kHistogramRounds, "histograms has shape ", histograms.sizes(),
                    "; allowed rounds before this one: 0 to ", kHistogramRounds - 1);
  p.histogram = masses_of(histogram, "histogram", 2);
  check_size(histogram, "histogram", 0, p.num_top_p, "rows of histograms");
  check_size(histogram, "histogram", 1, kHistogramBins, "bins");
  launch(logits, cpu::shard_histogram, cuda::shard_histogram, p);
}

void shard_masses(const at::Tensor& logits, const at::Tensor& maxima, const at::Tensor& temperature, const at::Tensor& top_p,
                  const at::Tensor& min_p, const at::Tensor& histograms, const at::Tensor& chunk_masses) {
  ShardDrawParams p = rows_of(logits, maxima, temperature, top_p, histograms);
  fill_filters(p, min_p, histograms, chunk_masses);
  launch(logits, cpu::shard_masses, cuda::shard_masses, p);
}

void shard_draw(const at::Tensor& logits, const at::Tensor& maxima, const at::Tensor& temperature, const at::Tensor& top_p,
                const at::Tensor& min_p, const at::Tensor& seeds, const at::Tensor& positions, const at::Tensor& histograms,
                const at::Tensor& chunk_masses, const at::Tensor& masses, int64_t rank, int64_t first_id,
                const at::Tensor& tokens) {
  ShardDrawParams p = rows_of(logits, maxima, temperature, top_p, histograms);
  fill_filters(p, min_p, histograms, chunk_masses);
  p.seeds = per_row<int64_t>(seeds, "seeds", at::kLong, p.batch_size);
  p.positions = per_row<int64_t>(positions, "positions", at::kLong, p.batch_size);
  p.masses = masses_of(masses, "masses", 2);
  check_size(masses, "masses", 1, p.batch_size, "batch_size, rows of logits");
  TORCH_CHECK_VALUE(rank >= 0 && rank < masses.size(0), "rank is ", rank, "; allowed: 0 to ", masses.size(0) - 1,
                    ", rows of masses");
  TORCH_CHECK_VALUE(first_id >= 0 && first_id <= kMaxVocabSize - p.vocab_size, "first_id is ", first_id, "; allowed: 0 to ",
                    kMaxVocabSize - p.vocab_size, ", for vocabularies have up to ", kMaxVocabSize, " tokens");
  p.world_size = int32_t(masses.size(0));
  p.rank = int32_t(rank);
  p.first_id = first_id;
  per_row<int64_t>(tokens, "tokens", at::kLong, p.batch_size);
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  launch(logits, cpu::shard_draw, cuda::shard_draw, p);
}

void implement(torch::Library& m) {
  impl<"shard_histogram", shard_histogram>(m);
  impl<"shard_masses", shard_masses>(m);
  impl<"shard_draw", shard_draw>(m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tilestream, m) {
  m.def(
      "shard_histogram(Tensor logits, Tensor maxima, Tensor temperature, Tensor top_p, Tensor histograms, Tensor(a!) histogram) "
      "-> ()");
  m.def(
      "shard_masses(Tensor logits, Tensor maxima, Tensor temperature, Tensor top_p, Tensor min_p, Tensor histograms, "
      "Tensor(a!) chunk_masses) -> ()");
  m.def(
      "shard_draw(Tensor logits, Tensor maxima, Tensor temperature, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions, "
      "Tensor histograms, Tensor chunk_masses, Tensor masses, int rank, int first_id, Tensor(a!) tokens) -> ()");
}
TORCH_LIBRARY_IMPL(tilestream, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tilestream, CUDA, m) { implement(m); }

}  // namespace tilestream::api
