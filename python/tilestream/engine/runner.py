"""One model step: the batch's tensors, the forward pass, the draw of tokens."""

from __future__ import annotations

import torch

from tilestream.engine.batch import BatchBuilder, SamplingBuilder
from tilestream.engine.config import EngineConfig
from tilestream.engine.scheduler import SampledTokens, StepPlan
from tilestream.ops import AttentionPlanner, KvCache, sample


class ModelRunner:
    """Owns the KV cache and runs StepPlans on a model.

    Args:
        model: config and forward(step, kv_caches) (tilestream.models).
        config: the engine's limits.
        kv_dtype: float32, float16, bfloat16, fp8, int8 or int4.
    """

    def __init__(self, model, config: EngineConfig, *, kv_dtype: str = "bfloat16") -> None:
        m = model.config
        self.model = model
        self.vocab_size = m.vocab_size
        self.kv_caches = [
            KvCache.allocate(config.num_pages, m.num_kv_heads, config.page_size, m.head_dim, kv_dtype=kv_dtype)
            for _ in range(m.num_layers)
        ]
        planners = {
            window_left: AttentionPlanner(
                m.num_qo_heads,
                m.num_kv_heads,
                m.head_dim,
                page_size=config.page_size,
                window_left=window_left,
                batch_invariant=config.batch_invariant,
            )
            for window_left in sorted(set(m.window_left))
        }
        self.batch = BatchBuilder(
            planners,
            page_size=config.page_size,
            max_pages_per_seq=-(-min(config.max_model_len, config.capacity_tokens) // config.page_size),
            max_num_seqs=config.max_running_requests,
            max_num_tokens=config.token_budget,
        )
        self.sampling = SamplingBuilder()

    @torch.inference_mode()
    def run(self, step: StepPlan) -> SampledTokens:
        """Run one step: compute its tokens' KV, and draw a token for each request that is up to date."""
        logits = self.model.forward(self.batch.build(step), self.kv_caches)
        requests = [item.request for item in step.scheduled if item.samples]
        if not requests:
            return SampledTokens([])
        s = self.sampling.build(requests)
        drawn = sample(
            logits,
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
            s.seeds,
            s.positions,
            penalties=s.penalties,
            num_top_logprobs=s.num_top_logprobs,
        )
        if drawn.logprobs is None:
            return SampledTokens(drawn.tokens.tolist())
        return SampledTokens(
            drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.top_ids.tolist(), drawn.top_logprobs.tolist()
        )
