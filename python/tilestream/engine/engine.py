"""The engine: requests in, steps, deltas out. Synchronous and single-threaded; AsyncEngine adds the thread."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilestream.engine.request_builder import RequestBuilder
from tilestream.engine.config import EngineConfig
from tilestream.engine.constraints import ConstraintError
from tilestream.engine.errors import PromptTooLongError, QueueFullError
from tilestream.engine.metrics import EngineMetrics
from tilestream.engine.output import check_row_count, delta_of, read_token, row_logprobs, take_prompt_scores
from tilestream.engine.protocols import EngineTokenizer, Runner
from tilestream.engine.request import FinishReason, Request, RequestDelta, RequestOptions, RequestState, TokenLogprobs
from tilestream.engine.scheduler import SampledTokens, Scheduler, StepPlan
from tilestream.sampling_params import SamplingParams

logger = logging.getLogger("tilestream.engine")


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step on its way, and what the runner gave for it."""

    plan: StepPlan
    handle: Any


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
        self._builder = RequestBuilder(tokenizer, config, runner.vocab_size)
        self._requests: dict[str, Request] = {}
        self._in_flight: _Launched | None = None
        self._totals = EngineMetrics()
        self._runner_time_s = 0.0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
    ) -> None:
        """Queue a request; its first delta comes from a later step().

        Args:
            request_id: any string that no unfinished request has.
            prompt_token_ids: at least one token.
            params: sampling and stopping.
            options: for the scheduler.
        Raises:
            ValueError, TypeError, PromptTooLongError: as validate(); ValueError: request_id is in use.
            QueueFullError: max_queued_requests wait already.
        """
        token_ids = self.validate(prompt_token_ids, params)
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if self.num_waiting >= self.config.max_queued_requests:
            raise QueueFullError(self.num_waiting, self.config.max_queued_requests)
        request = self._builder.make_request(request_id, token_ids, params, options)
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

        With a runner that overlaps, the step is launched while the one before still runs, and what that one gave is
        handed out.

        Returns:
            One delta for every request that got a token or ended; empty when there was nothing to do.
        """
        begin_s, runner_begin_s = time.monotonic(), self._runner_time_s
        deltas = []
        before = self._in_flight
        if before is not None and self._needs_tokens():
            deltas += self._collect(before)
            before = None
        plan = self.scheduler.schedule()
        self._in_flight = None
        if plan is not None:
            deltas += self._launch(plan)
        if before is not None:
            deltas += self._collect(before)
        if self._in_flight is not None and not self.runner.overlaps:
            deltas += self._collect(self._in_flight)
            self._in_flight = None
        if plan is not None:
            self._count_step(plan, self._runner_time_s - runner_begin_s, time.monotonic() - begin_s)
        return deltas

    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work()

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
            ValueError: empty prompt, a token id outside the vocabulary, or a constraint that cannot be compiled.
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
        self.prepare(params)
        return token_ids

    def prepare(self, params: SamplingParams) -> None:
        """The part of validate() that may take long and needs no prompt: see RequestBuilder.prepare."""
        self._builder.prepare(params)

    def _needs_tokens(self) -> bool:
        """Whether a draw of the next step depends on tokens that the one in flight draws."""
        return any(r.num_pending_tokens > 0 and r.params.needs_history for r in self.scheduler.running)

    def _launch(self, plan: StepPlan) -> list[RequestDelta]:
        """Start a step; it is in flight then. If it does not start, its requests' last deltas."""
        begin_s = time.monotonic()
        try:
            launched = self.runner.launch(plan)
        except Exception as error:
            return self._fail_step(plan, error)
        finally:
            self._runner_time_s += time.monotonic() - begin_s
        for item in plan.scheduled:
            if item.request.first_scheduled_s is None:
                item.request.first_scheduled_s = begin_s
        self.scheduler.launched(plan)
        self._in_flight = _Launched(plan, launched)
        return []

    def _collect(self, step: _Launched) -> list[RequestDelta]:
        """Wait for a launched step, and hand out what it gave to those who are still there."""
        begin_s = time.monotonic()
        try:
            sampled = self.runner.collect(step.handle)
            check_row_count(sampled, step.plan)
        except Exception as error:
            return self._fail_step(step.plan, error)
        finally:
            self._runner_time_s += time.monotonic() - begin_s
        self.scheduler.complete(step.plan)
        for scores in sampled.prompt_scores:
            take_prompt_scores(scores)
        sampling = [item.request for item in step.plan.scheduled if item.samples]
        return [
            self._accept(request, sampled, row)
            for row, request in enumerate(sampling)
            if request.state is not RequestState.FINISHED
        ]

    def _accept(self, request: Request, sampled: SampledTokens, row: int) -> RequestDelta:
        """Take a request's new token. Whatever is wrong with it ends this request only."""
        token_id = sampled.token_ids[row]
        position = request.num_known_tokens
        if token_id < 0:
            message = (
                f"logits of request {request.request_id!r} contain NaN, or nothing finite to draw from, "
                f"at position {position}"
            )
            return self._finish(request, "error", error=message, forget_pages=True)
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
            self._totals.prompt_tokens += request.num_prompt_tokens
        if request.params.max_tokens == 0:
            return self._finish(request, "length")
        self._totals.generation_tokens += 1
        request.token_ids[position] = token_id
        request.num_pending_tokens -= 1
        try:
            logprobs = row_logprobs(request, sampled, row)
            text, reason, stop_reason, note = read_token(request, token_id, self.tokenizer.eos_token_ids, self.config)
        except ConstraintError as error:
            message = f"the constraint cannot be followed: {error}"
            return self._finish(request, "error", [token_id], stop_reason="constraint", error=message)
        except Exception as error:
            logger.exception("reading token %d of request %s failed", token_id, request.request_id)
            message = f"token {token_id} could not be read: {error!r}"
            return self._finish(request, "error", [token_id], error=message)
        if reason is None:
            return delta_of(request, text, [token_id], logprobs)
        return self._finish(request, reason, [token_id], text, logprobs, stop_reason=stop_reason, error=note)

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[RequestDelta]:
        """The runner raised: end the requests of this step; what waits is untouched, and the engine goes on."""
        logger.error("a step with %d requests failed", len(plan.scheduled), exc_info=error)
        message = f"the step failed: {type(error).__name__}: {error}"
        return [
            self._finish(item.request, "error", error=message)
            for item in plan.scheduled
            if item.request.state is not RequestState.FINISHED
        ]

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
        del request.token_ids[request.num_known_tokens :]
        request.num_pending_tokens = 0
        del self._requests[request.request_id]
        self._totals.finished_requests[reason] += 1
        text += request.detokenizer.flush()
        delta = delta_of(request, text, list(token_ids), logprobs)
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
