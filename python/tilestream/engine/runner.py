"""One model step: the batch's tensors, the forward pass, the draw of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestream.engine.batch import BatchBuilder, SamplingBuilder, padded_decodes
from tilestream.engine.config import EngineConfig
from tilestream.engine.logits import edit_logits, token_logprobs
from tilestream.engine.request import Request
from tilestream.engine.step_plan import PromptScores, SampledTokens, StepPlan
from tilestream.ops import AttentionPlanner, KvCache, sample

_SCORED_ROWS = 32  # prompt tokens whose logits are held at a time: 4 to 20 MB


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """What a step has drawn, on its way into host memory; there, and the step done, once `copied` has happened (None: it
    is there).

    Args:
        tensors: tokens, and if any request wants them logprobs, top_ids, top_logprobs (tilestream.ops.sample); then for
            each of `scores` its logprobs, top_ids, top_logprobs.
        scores: prompt tokens that the step has scored: whose, and the first one's position.
    """

    tensors: tuple[torch.Tensor, ...]
    copied: torch.cuda.Event | None
    scores: tuple[tuple[Request, int], ...] = ()


class ModelRunner:
    """Owns the KV cache and runs StepPlans on a model, where its placement says.

    Args:
        model: config, placement, forward(step, kv_caches) and logits_of(rows) (tilestream.models).
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
            num_rows = max(decodes, _SCORED_ROWS)
            model.reserve(max(config.token_budget, decodes), num_rows=num_rows, num_positions=max_len)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=placement.device)  # by the step launched last

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start one step: it computes its tokens' KV, and draws a token for each request that is up to date."""
        step = self.batch.build(plan)
        if self.overlaps:
            self._fill_drawn(step.token_ids)
        logits = self.model.forward(step, self.kv_caches)
        requests = [item.request for item in plan.scheduled if item.samples]
        drawn = self._draw(logits[: len(requests)], requests) if requests else ()
        scores, scored = self._score_prompts(plan)  # after the draw: it overwrites the logits
        return _to_host(drawn + scored, scores, self.model.placement.device)

    def _draw(self, logits: torch.Tensor, requests: list[Request]) -> tuple[torch.Tensor, ...]:
        edited = [(row, request) for row, request in enumerate(requests) if request.edits_logits]
        s = self.sampling.build(requests)
        raw = None
        if edited:
            if s.num_top_logprobs is not None:  # logprobs are the model's own: of these rows, from before the edits
                edited_rows = torch.tensor([row for row, _ in edited], device=logits.device)
                raw = logits[edited_rows]
            edit_logits(logits, edited)
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
        self._drawn = drawn.tokens
        if drawn.logprobs is None:
            return (drawn.tokens,)
        reported = drawn.logprobs, drawn.top_ids, drawn.top_logprobs
        if raw is not None:
            exact = token_logprobs(raw, drawn.tokens[edited_rows], s.num_top_logprobs)
            for tensor, values in zip(reported, exact, strict=True):
                tensor[edited_rows] = values
        return drawn.tokens, *reported

    def _score_prompts(self, plan: StepPlan) -> tuple[tuple[tuple[Request, int], ...], tuple[torch.Tensor, ...]]:
        """Logprobs of the prompt tokens that follow those of this step, for requests that want them."""
        scores, tensors, first_row = [], [], 0
        for item in plan.scheduled:
            request, begin = item.request, item.start
            if request.lacks_prompt_logprobs:
                end = min(begin + item.num_new_tokens, request.num_prompt_tokens - 1)
                pieces = []
                for start in range(begin, end, _SCORED_ROWS):
                    rows = torch.arange(start, min(start + _SCORED_ROWS, end)) + (first_row - begin)
                    tokens = torch.tensor(request.token_ids[start + 1 : min(start + _SCORED_ROWS, end) + 1])
                    device = self.model.placement.device
                    logits = self.model.logits_of(rows.to(device, non_blocking=True))
                    num_top = request.params.prompt_logprobs
                    pieces.append(token_logprobs(logits, tokens.to(device, non_blocking=True), num_top))
                if pieces:
                    scores.append((request, begin + 1))
                    tensors += [torch.cat(parts) for parts in zip(*pieces, strict=True)]
            first_row += item.num_new_tokens
        return tuple(scores), tuple(tensors)

    def collect(self, launched: LaunchedStep) -> SampledTokens:
        """Wait for a step, and read what it has drawn."""
        if launched.copied is not None:
            launched.copied.synchronize()
        values = [tensor.tolist() for tensor in launched.tensors]
        num_drawn = len(values) - 3 * len(launched.scores)
        scores = [
            PromptScores(request, start, *values[num_drawn + 3 * i : num_drawn + 3 * i + 3])
            for i, (request, start) in enumerate(launched.scores)
        ]
        sampled = SampledTokens(*values[:num_drawn]) if num_drawn else SampledTokens([])
        sampled.prompt_scores = scores
        return sampled

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


def _to_host(
    tensors: tuple[torch.Tensor, ...], scores: tuple[tuple[Request, int], ...], device: torch.device
) -> LaunchedStep:
    if device.type != "cuda":
        return LaunchedStep(tensors, None, scores)
    host = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
    copied = torch.cuda.Event()  # also of a step that draws nothing: its time is measured, and its faults are its own
    copied.record()
    return LaunchedStep(host, copied, scores)
