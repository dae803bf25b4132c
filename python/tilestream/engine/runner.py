"""One model step: the batch's tensors, the forward pass, the draw of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from tilestream.distributed.weave import COMMUNICATION_BLOCKS, SplitRule, split_rule
from tilestream.engine.batch import BatchBuilder, SamplingBuilder, largest_step, padded_decodes
from tilestream.engine.config import EngineConfig
from tilestream.engine.errors import EngineDeadError
from tilestream.engine.logits import edit_logits, token_logprobs
from tilestream.engine.request import Request
from tilestream.engine.sampling_shards import (
    SCORED_ROWS,
    DrawPlan,
    VocabularyShards,
    sample_candidates,
    scored_chunks,
)
from tilestream.engine.step_plan import PromptScores, SampledTokens, StepPlan
from tilestream.engine.step_split import split_step
from tilestream.ops import KvCache, sample


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


def most_step_tokens(config: EngineConfig) -> int:
    """Tokens of the largest step, padding included."""
    return largest_step(config.token_budget, config.max_num_seqs)


class ModelRunner:
    """Owns the KV cache and runs StepPlans on a model, where its placement says.

    Of a model that is cut among ranks each has a runner: rank 0's launches steps, which the others follow.

    Args:
        model: config, placement, communicator and shard, forward(step, kv_caches) and logits_of(rows) (tilestream.models).
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
        self.batch = BatchBuilder.of(model, config, kv_dtype)
        self.sampling = SamplingBuilder(placement.device)
        self.communicator, self.shards = model.communicator, None
        self.split_rule: SplitRule | None = None  # which steps run in two halves
        if self.communicator is not None:
            self.shards = VocabularyShards(self.communicator, model.shard.vocabularies)
            self.few_sampling, self.parted_sampling = SamplingBuilder(placement.device), SamplingBuilder(placement.device)
            self.halves = [BatchBuilder.of(model, config, kv_dtype, num_taken_sms=COMMUNICATION_BLOCKS) for _ in range(2)]
            for half in self.halves:
                half.pads = False  # no graph holds a half, and padding would stand between rows of logits
            if self.overlaps:  # on a CPU the halves would only come one after the other
                self.split_rule = split_rule(m, self.communicator, placement.device)
        if self.overlaps or self.shards is not None:  # what a captured graph and other ranks point into does not move
            num_rows = max(padded_decodes(config.max_running_requests), SCORED_ROWS)
            model.reserve(most_step_tokens(config), num_rows=num_rows, num_positions=config.max_request_tokens)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=placement.device)  # by the step launched last

    @torch.inference_mode()
    def launch(self, plan: StepPlan, draws: DrawPlan | None = None) -> LaunchedStep:
        """Start one step: it computes its tokens' KV, and draws a token for each request that is up to date.

        Args:
            plan: the step.
            draws: draw_plan() of it, which the other ranks have too; None: there are none.
        """
        logits = self._forward(plan)
        requests = [item.request for item in plan.scheduled if item.samples]
        drawn = ()
        if requests:
            logits = logits[: len(requests)]
            if self.shards is None:
                drawn = self._draw(logits, requests)
            else:
                drawn = self._draw_of_shards(logits, draws, requests)
            self._drawn = drawn[0]
        scores, scored = self._score_prompts(plan)  # after the draw: it overwrites the logits
        return _to_host(drawn + scored, scores, self.model.placement.device)

    @torch.inference_mode()
    def follow(self, plan: StepPlan, draws: DrawPlan) -> None:
        """This rank's part of a step that rank 0 launches.

        Args:
            plan: that step; of its requests only token ids and pages count.
            draws: draw_plan() of it, from rank 0, which knows the requests.
        """
        logits = self._forward(plan)
        if draws.num_rows:
            (self._drawn,) = self._draw_of_shards(logits[: draws.num_rows], draws, None)
        for first_row, num in draws.scored:
            self._logits_of(first_row, num)
        self.communicator.check()

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        if self.split_rule is not None and any(item.num_new_tokens > 1 for item in plan.scheduled):  # decodes have graphs
            num_first = self.split_rule.first_tokens(sum(item.num_new_tokens for item in plan.scheduled))
            if num_first:
                return self._forward_halves(split_step(plan, num_first))
        step = self.batch.build(plan)
        if self.overlaps:
            self._fill_drawn(step.token_ids)
        try:
            return self.model.forward(step, self.kv_caches)
        except RuntimeError:
            if self.communicator is not None:  # a replayed program does not say which rank has died
                self.communicator.check()
            raise

    def _forward_halves(self, plans: tuple[StepPlan, StepPlan]) -> torch.Tensor:
        halves = [builder.build(plan) for builder, plan in zip(self.halves, plans, strict=True)]
        if self.overlaps:
            for half in halves:
                self._fill_drawn(half.token_ids)
        return self.model.forward_halves(halves, self.kv_caches)

    def _logits_of(self, first_row: int, num_rows: int) -> torch.Tensor | None:
        """Whole logits of some tokens of the step; None on ranks that have no use for them."""
        rows = torch.arange(first_row, first_row + num_rows).to(self.model.placement.device, non_blocking=True)
        logits = self.model.logits_of(rows)
        return logits if self.shards is None else self.shards.whole(logits)

    def _draw_of_shards(
        self, logits: torch.Tensor, draws: DrawPlan, requests: list[Request] | None
    ) -> tuple[torch.Tensor, ...]:
        """This rank's part of the draws; of the tensors of _draw() the first, the tokens, may be known on rank 0 only.

        Args:
            logits: [num_rows, this rank's tokens].
            requests: of the rows; None on all ranks but 0.
        """

        def of(rows: tuple[int, ...]) -> list[Request]:
            return [requests[row] for row in rows]

        tokens = torch.full((draws.num_rows,), -1, dtype=torch.int64, device=logits.device)
        reported = ()
        if draws.few:
            keys = self.shards.candidates(_rows(logits, draws.few), draws.num_candidates)
            if keys is not None:
                _put(tokens, draws.few, sample_candidates(keys, self.few_sampling.build(of(draws.few))))
        if draws.parted:
            s = self.parted_sampling.build(of(draws.parted)) if requests is not None else None
            _put(tokens, draws.parted, self.shards.drawn(_rows(logits, draws.parted), s, draws.num_top_p))
        if draws.whole:
            whole = self.shards.whole(_rows(logits, draws.whole))
            if whole is not None:
                drawn, *reported = self._draw(whole, of(draws.whole))
                _put(tokens, draws.whole, drawn)
                reported = tuple(_spread(tensor, draws.whole, draws.num_rows) for tensor in reported)
        if draws.parted or self.overlaps:  # every rank has to know what the next step begins with
            tokens = self.shards.agreed(tokens)
        return tokens, *reported

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
        device = self.model.placement.device
        scores, tensors = [], []
        for request, chunks in groupby(scored_chunks(plan), key=lambda chunk: chunk.request):
            pieces = []
            for chunk in chunks:
                end = chunk.start + chunk.num_rows
                tokens = torch.tensor(request.token_ids[chunk.start + 1 : end + 1]).to(device, non_blocking=True)
                logits = self._logits_of(chunk.first_row, chunk.num_rows)
                pieces.append((chunk.start + 1, token_logprobs(logits, tokens, request.params.prompt_logprobs)))
            scores.append((request, pieces[0][0]))
            tensors += [torch.cat(parts) for parts in zip(*(piece for _, piece in pieces), strict=True)]
        return tuple(scores), tuple(tensors)

    def collect(self, launched: LaunchedStep) -> SampledTokens:
        """Wait for a step, and read what it has drawn."""
        if launched.copied is not None:
            launched.copied.synchronize()
        if self.communicator is not None:
            self.communicator.check()
        values = [tensor.tolist() for tensor in launched.tensors]
        num_drawn = len(values) - 3 * len(launched.scores)
        scores = [
            PromptScores(request, start, *values[num_drawn + 3 * i : num_drawn + 3 * i + 3])
            for i, (request, start) in enumerate(launched.scores)
        ]
        sampled = SampledTokens(*values[:num_drawn]) if num_drawn else SampledTokens([])
        sampled.prompt_scores = scores
        return sampled

    def check(self) -> None:
        """See Runner. A GPU that has failed once, by a bad address say, fails whatever it is asked for afterwards."""
        if not self.overlaps:
            return
        try:
            torch.cuda.synchronize(self.model.placement.device)
        except RuntimeError as error:
            raise EngineDeadError(f"the GPU has failed for good: {str(error).partition(chr(10))[0]}") from error

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


def _rows(logits: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    return logits if rows == tuple(range(logits.size(0))) else logits[_indices(rows, logits)]


def _put(tokens: torch.Tensor, rows: tuple[int, ...], values: torch.Tensor) -> None:
    tokens[_indices(rows, tokens)] = values


def _spread(tensor: torch.Tensor, rows: tuple[int, ...], num_rows: int) -> torch.Tensor:
    """[num_rows, ...] with these rows, and zeros elsewhere."""
    spread = tensor.new_zeros(num_rows, *tensor.shape[1:])
    spread[_indices(rows, tensor)] = tensor
    return spread


def _indices(rows: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows).to(tensor.device, non_blocking=True)


def _to_host(
    tensors: tuple[torch.Tensor, ...], scores: tuple[tuple[Request, int], ...], device: torch.device
) -> LaunchedStep:
    if device.type != "cuda":
        return LaunchedStep(tensors, None, scores)
    host = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors)
    copied = torch.cuda.Event()  # also of a step that draws nothing: its time is measured, and its faults are its own
    copied.record()
    return LaunchedStep(host, copied, scores)
