"""One model step: the batch's tensors, the forward pass, the draw of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestream.engine.batch import BatchBuilder, SamplingBuilder, padded_decodes
from tilestream.engine.config import EngineConfig
from tilestream.engine.scheduler import SampledTokens, StepPlan
from tilestream.ops import AttentionPlanner, KvCache, sample


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """What a step has drawn, on its way into host memory; there once `copied` has happened (None: it is there).

    Args:
        tensors: tokens, and if any request wants them logprobs, top_ids, top_logprobs (tilestream.ops.sample).
    """

    tensors: tuple[torch.Tensor, ...]
    copied: torch.cuda.Event | None


class ModelRunner:
    """Owns the KV cache and runs StepPlans on a model, where its placement says.

    Args:
        model: config, placement and forward(step, kv_caches) (tilestream.models).
        config: the engine's limits.
        kv_dtype: float32, float16, bfloat16, fp8, int8 or int4.
    """

    def __init__(self, model, config: EngineConfig, *, kv_dtype: str = "bfloat16") -> None:
        m, placement = model.config, model.placement
        self.model = model
        self.vocab_size = m.vocab_size
        self.overlaps = placement.asynchronous
        self.kv_caches = [
            KvCache.allocate(
                config.num_pages, m.num_kv_heads, config.page_size, m.head_dim, kv_dtype=kv_dtype,
                blocked=placement.blocked_kv, device=placement.device,
            )  # fmt: skip
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
                device=placement.device,
                kv_dtype=kv_dtype,
            )
            for window_left in sorted(set(m.window_left))
        }
        max_len = min(config.max_model_len, config.capacity_tokens)
        self.batch = BatchBuilder(
            planners,
            page_size=config.page_size,
            max_pages_per_seq=-(-max_len // config.page_size),
            max_num_seqs=config.max_running_requests,
            max_num_tokens=config.token_budget,
            placement=placement,
        )
        self.sampling = SamplingBuilder(placement.device)
        if self.overlaps:  # what a captured graph points into does not move
            decodes = padded_decodes(config.max_running_requests)
            model.reserve(max(config.token_budget, decodes), num_rows=decodes, num_positions=max_len)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=placement.device)  # by the step launched last

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start one step: it computes its tokens' KV, and draws a token for each request that is up to date."""
        step = self.batch.build(plan)
        if self.overlaps:
            self._fill_drawn(step.token_ids)
        logits = self.model.forward(step, self.kv_caches)
        requests = [item.request for item in plan.scheduled if item.samples]
        if not requests:
            return LaunchedStep((), None)
        s = self.sampling.build(requests)
        drawn = sample(
            logits[: len(requests)],
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
            s.seeds,
            s.positions,
            penalties=s.penalties,
            num_top_logprobs=s.num_top_logprobs,
        )
        self._drawn = drawn.tokens
        wanted = (drawn.tokens,)
        if drawn.logprobs is not None:
            wanted = drawn.tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
        return _to_host(wanted)

    def collect(self, launched: LaunchedStep) -> SampledTokens:
        """Wait for a step, and read what it has drawn."""
        if launched.copied is not None:
            launched.copied.synchronize()
        return SampledTokens(*(t.tolist() for t in launched.tensors)) if launched.tensors else SampledTokens([])

    def clear_pages(self, num_pages: int) -> None:
        """Set the first so many KV pages to zero, in memory of their own: what was never written has none."""
        for cache in self.kv_caches:
            for tensor in (cache.k_cache, cache.v_cache, cache.kv_scales):
                if tensor is not None:
                    tensor[:num_pages].zero_()

    def _fill_drawn(self, token_ids: torch.Tensor) -> None:
        """Replace each -1 - i by the token that row i of the step before drew, in place, without waiting for it.

        A row that drew none (-1, its logits hold a NaN) gives token 0: its request ends before this step's result counts.
        """
        rows = (-1 - token_ids).clamp_(min=0, max=self._drawn.size(0) - 1)
        torch.where(token_ids < 0, self._drawn[rows], token_ids, out=token_ids)
        token_ids.clamp_(min=0)


def _to_host(tensors: tuple[torch.Tensor, ...]) -> LaunchedStep:
    if not tensors[0].is_cuda:
        return LaunchedStep(tensors, None)
    host = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
    copied = torch.cuda.Event()
    copied.record()
    return LaunchedStep(host, copied)
