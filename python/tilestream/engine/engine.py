"""The engine: requests in, steps, deltas out. Synchronous and single-threaded; AsyncEngine adds the thread."""

from __future__ import annotations

import logging
import operator
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from tilestream.engine.config import EngineConfig
from tilestream.engine.detokenizer import Detokenizer, TokenBytes
from tilestream.engine.errors import PromptTooLongError, QueueFullError
from tilestream.engine.metrics import EngineMetrics
from tilestream.engine.request import FinishReason, Request, RequestDelta, TokenLogprobs
from tilestream.engine.scheduler import SampledTokens, Scheduler, StepPlan
from tilestream.sampling_params import SamplingParams

logger = logging.getLogger("tilestream.engine")


class Runner(Protocol):
    """Runs one step of the model and samples. vocab_size: token ids that the model can embed."""

    vocab_size: int

    def run(self, plan: StepPlan) -> SampledTokens: ...


class EngineTokenizer(TokenBytes, Protocol):
    """What the engine asks of a tokenizer."""

    eos_token_ids: frozenset[int]


class Engine:
    """Runs requests step by step.

    Which tokens a request gets depends on its prompt, its parameters and its seed alone: the runner draws
    from (seed, position), so neither the batch nor a preemption changes a result.

    Args:
        runner: computes a step.
        tokenizer: end-of-sequence tokens and token bytes.
        config: limits.
    """

    def __init__(self, runner: Runner, tokenizer: EngineTokenizer, config: EngineConfig) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.config = config
        self.scheduler = Scheduler(config)
        self._requests: dict[str, Request] = {}
        self._seeds = random.Random(config.seed)
        self._totals = EngineMetrics()

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request; its first delta comes from a later step().

        Args:
            request_id: any string that no unfinished request has.
            prompt_token_ids: at least one token.
            params: sampling and stopping.
        Raises:
            ValueError, TypeError, PromptTooLongError: as validate(); ValueError: request_id is in use.
            QueueFullError: max_queued_requests wait already.
        """
        token_ids = self.validate(prompt_token_ids, params)
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if self.num_waiting >= self.config.max_queued_requests:
            raise QueueFullError(self.num_waiting, self.config.max_queued_requests)
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            detokenizer=Detokenizer(self.tokenizer, params.stop, include_stop=params.include_stop_str_in_output),
            arrival_s=time.monotonic(),
        )
        self._requests[request_id] = request
        self.scheduler.add(request)

    def abort(self, request_id: str) -> RequestDelta | None:
        """End a request between steps and free its pages at once.

        Returns:
            Its last delta, with finish_reason "abort"; None if there is no such unfinished request.
        """
        request = self._requests.get(request_id)
        return None if request is None else self._finish(request, "abort")

    def step(self) -> list[RequestDelta]:
        """Run one step: plan it, compute it, hand out what it gave.

        Returns:
            One delta for every request that got a token or ended; empty when there was nothing to do.
        """
        begin_s = time.monotonic()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        runner_begin_s = time.monotonic()
        try:
            sampled = self.runner.run(plan)
            _check_row_count(sampled, plan)
        except Exception as error:
            logger.exception("a step with %d requests failed", len(plan.scheduled))
            return self._fail_step(plan, error)
        runner_end_s = time.monotonic()
        deltas = self._postprocess(plan, sampled, begin_s)
        self._count_step(plan, runner_end_s - runner_begin_s, time.monotonic() - begin_s)
        return deltas

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def metrics(self) -> EngineMetrics:
        """A snapshot; may be taken from another thread."""
        scheduler = self.scheduler
        return replace(
            self._totals,
            finished_requests=dict(self._totals.finished_requests),
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.num_owned_pages / scheduler.pool.num_pages,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
        )

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """Check what can be checked without the queue; reads only what never changes, so any thread may call it.

        Returns:
            The prompt as a list of its own.
        Raises:
            TypeError: params is no SamplingParams, or a token id no integer.
            ValueError: empty prompt, or a token id outside the vocabulary.
            PromptTooLongError: the prompt leaves no room for output, or does not fit the whole KV cache.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        try:
            token_ids = [operator.index(token_id) for token_id in prompt_token_ids]
        except TypeError as error:
            raise TypeError(f"prompt_token_ids must be integers: {error}") from None
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        if len(token_ids) >= self.config.max_model_len:
            limit_name = f"max_model_len is {self.config.max_model_len}, and one token is for the output"
            raise PromptTooLongError(len(token_ids), self.config.max_model_len - 1, limit_name)
        if len(token_ids) > self.config.capacity_tokens:
            raise PromptTooLongError(len(token_ids), self.config.capacity_tokens, "the size of the whole KV cache")
        vocab_size = self.runner.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
            raise ValueError(f"prompt_token_ids[{index}] is {token_ids[index]}; token ids are 0..{vocab_size - 1}")
        return token_ids

    def _postprocess(self, plan: StepPlan, sampled: SampledTokens, begin_s: float) -> list[RequestDelta]:
        self.scheduler.complete(plan)
        deltas = []
        row = 0
        for item in plan.scheduled:
            request = item.request
            if request.first_scheduled_s is None:
                request.first_scheduled_s = begin_s
            if item.samples:
                deltas.append(self._accept(request, sampled, row))
                row += 1
        return deltas

    def _accept(self, request: Request, sampled: SampledTokens, row: int) -> RequestDelta:
        """Take a request's new token. Whatever is wrong with it ends this request only."""
        token_id = sampled.token_ids[row]
        if token_id < 0:
            message = (
                f"logits of request {request.request_id!r} contain NaN, or nothing finite to draw from, "
                f"at position {request.num_tokens}"
            )
            return self._finish(request, "error", error=message, forget_pages=True)
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
            self._totals.prompt_tokens += request.num_prompt_tokens
        self._totals.generation_tokens += 1
        request.token_ids.append(token_id)
        try:
            logprobs = _row_logprobs(request, sampled, row)
            text, reason, stop_reason, note = self._read(request, token_id)
        except Exception as error:
            logger.exception("reading token %d of request %s failed", token_id, request.request_id)
            message = f"token {token_id} could not be read: {error!r}"
            return self._finish(request, "error", [token_id], error=message)
        if reason is None:
            return _delta(request, text, [token_id], logprobs)
        return self._finish(request, reason, [token_id], text, logprobs, stop_reason=stop_reason, error=note)

    def _read(
        self, request: Request, token_id: int
    ) -> tuple[str, FinishReason | None, str | int | None, str | None]:
        """New text, and if the request ends here: why, by which stop string or token, and a note for people."""
        params, config = request.params, self.config
        is_stop_token = token_id in params.stop_token_ids
        is_eos = token_id in self.tokenizer.eos_token_ids and not params.ignore_eos
        text, stop_string = "", None
        if not (is_eos or is_stop_token) or params.include_stop_str_in_output:
            text, stop_string = request.detokenizer.append(token_id)
        if is_stop_token:
            return text, "stop", token_id, None
        if is_eos:
            return text, "stop", None, None
        if stop_string is not None:
            return text, "stop", stop_string, None
        if request.num_output_tokens == params.max_tokens or request.num_tokens >= config.max_model_len:
            return text, "length", None, None
        if request.num_tokens > config.capacity_tokens:
            note = (
                f"the request ended at {request.num_tokens} tokens because the whole KV cache holds "
                f"{config.capacity_tokens}; a larger kv_cache_tokens lets it go on to max_model_len = "
                f"{config.max_model_len}"
            )
            return text, "length", None, note
        return text, None, None, None

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[RequestDelta]:
        """The runner raised: end the requests of this step; what waits is untouched, and the engine goes on."""
        message = f"the step failed: {type(error).__name__}: {error}"
        return [self._finish(item.request, "error", error=message) for item in plan.scheduled]

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: list[TokenLogprobs] | None = None,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
        forget_pages: bool = False,
    ) -> RequestDelta:
        self.scheduler.finish(request, forget_pages=forget_pages)
        del self._requests[request.request_id]
        self._totals.finished_requests[reason] += 1
        text += request.detokenizer.flush()
        delta = _delta(request, text, list(token_ids), logprobs)
        return replace(
            delta, finish_reason=reason, stop_reason=stop_reason, error=error, finish_s=time.monotonic()
        )

    def _count_step(self, plan: StepPlan, runner_time_s: float, step_time_s: float) -> None:
        totals = self._totals
        totals.num_steps += 1
        totals.step_tokens += plan.num_tokens
        totals.step_time_s += step_time_s
        totals.runner_time_s += runner_time_s
        totals.last_step_tokens = plan.num_tokens
        totals.last_step_time_s = step_time_s


def _check_row_count(sampled: SampledTokens, plan: StepPlan) -> None:
    if len(sampled.token_ids) != plan.num_samples:
        raise RuntimeError(f"the runner gave {len(sampled.token_ids)} tokens for {plan.num_samples} sampling rows")


def _row_logprobs(request: Request, sampled: SampledTokens, row: int) -> list[TokenLogprobs] | None:
    num_top = request.params.logprobs
    if num_top is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        top = tuple(zip(sampled.top_ids[row][:num_top], sampled.top_logprobs[row][:num_top], strict=True))
    return [TokenLogprobs(sampled.token_ids[row], sampled.logprobs[row], top)]


def _delta(
    request: Request, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None
) -> RequestDelta:
    return RequestDelta(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        num_cached_tokens=request.num_cached_tokens or 0,
        arrival_s=request.arrival_s,
        first_scheduled_s=request.first_scheduled_s,
        first_token_s=request.first_token_s,
    )
