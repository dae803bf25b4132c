"""The engine: requests in, steps, deltas out. Synchronous and single-threaded; AsyncEngine adds the thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from tilestream.engine.admission import QueueLimits, checked_prompt
from tilestream.engine.config import EngineConfig
from tilestream.engine.constraints import ConstraintError
from tilestream.engine.cost_model import CostModel
from tilestream.engine.deadlines import Deadlines, deadline_text
from tilestream.engine.errors import EngineDeadError
from tilestream.engine.metrics import EngineMetrics, EngineWatch
from tilestream.engine.output import check_row_count, delta_of, read_token, row_logprobs, take_prompt_scores
from tilestream.engine.profiler import measure_cost_model
from tilestream.engine.protocols import EngineTokenizer, Runner
from tilestream.engine.request import FinishReason, Request, RequestDelta, RequestOptions, RequestState, TokenLogprobs
from tilestream.engine.request_builder import RequestBuilder
from tilestream.engine.scheduler import Scheduler
from tilestream.engine.step_plan import SampledTokens, StepInFlight, StepPlan
from tilestream.sampling_params import SamplingParams

logger = logging.getLogger("tilestream.engine")


class Engine:
    """Runs requests step by step.

    Which tokens a request gets depends on its prompt, its parameters and its seed alone: the runner draws
    from (seed, position), so neither the batch nor a preemption changes a result.

    Args:
        runner: computes a step.
        tokenizer: end-of-sequence tokens and token bytes.
        config: limits.
        cost_model: what a step of this runner costs; None: measured now if config.tbt_ms asks for it.
    Attributes:
        cost_model: None without config.tbt_ms.
        watch: its counters, its last steps, and its trace.
    """

    def __init__(
        self, runner: Runner, tokenizer: EngineTokenizer, config: EngineConfig, cost_model: CostModel | None = None
    ) -> None:
        if cost_model is None and config.tbt_ms is not None:
            cost_model = measure_cost_model(runner, tokenizer, config)
        self.runner = runner
        self.tokenizer = tokenizer
        self.config = config
        self.cost_model = cost_model
        self.scheduler = Scheduler(config, cost_model)
        self._builder = RequestBuilder(tokenizer, config, runner.vocab_size)
        self._queue_limits = QueueLimits(config)
        self._requests: dict[str, Request] = {}
        self._deadlines = Deadlines(self._requests)
        self._in_flight: StepInFlight | None = None
        self._collected_s = 0.0  # when a step was last waited for
        self.watch = EngineWatch()

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
            QueueFullError: max_queued_requests or max_queued_tokens wait already.
        """
        request = self.make_request(request_id, prompt_token_ids, params, options)
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        self.check_queue(request.num_tokens)
        self.enqueue(request)

    def make_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, options: RequestOptions
    ) -> Request:
        """The part of add_request() that costs time. It reads only what never changes, so any thread may call it.

        Returns:
            A request for enqueue().
        Raises:
            ValueError, TypeError, PromptTooLongError: as validate().
        """
        return self._builder.make_request(request_id, prompt_token_ids, params, options)

    def enqueue(self, request: Request) -> None:
        """The rest of it: let a request wait that make_request() gave, and that check_queue() had room for."""
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self._deadlines.add(request)

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
        Raises:
            EngineDeadError: the runner can run no step any more.
        """
        begin_s = self.watch.begin_step()
        expired = self._deadlines.take_passed(begin_s)
        deltas = [self._finish(request, "abort", error=deadline_text(request)) for request in expired]
        before = self._in_flight
        if before is not None and self._needs_tokens():
            deltas += self._collect(before)
            before = None
        with self.watch.span("schedule"):
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
            step = self.watch.end_step(plan, self.config.token_budget, self.scheduler)
            self._queue_limits.count_step(step.num_tokens, step.end_s - step.begin_s)
        return deltas

    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work()

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def metrics(self) -> EngineMetrics:
        """A snapshot; may be taken from another thread."""
        return self.watch.snapshot(self.scheduler)

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """Check what can be checked without the queue; reads only what never changes, so any thread may call it.

        Returns:
            The prompt as a list of its own.
        Raises:
            TypeError: params is no SamplingParams, or a token id no integer.
            ValueError: empty prompt, a token id outside the vocabulary, or a constraint that cannot be compiled.
            PromptTooLongError: the prompt leaves no room for output, or does not fit the whole KV cache.
        """
        token_ids = checked_prompt(prompt_token_ids, params, self.config, self.runner.vocab_size)
        self.prepare(params)
        return token_ids

    def prepare(self, params: SamplingParams) -> None:
        """The part of validate() that may take long and needs no prompt: see RequestBuilder.prepare."""
        self._builder.prepare(params)

    def check_queue(self, num_prompt_tokens: int, *, num_requests: int = 0, num_tokens: int = 0) -> None:
        """Check that one more request may wait; any thread may call it.

        Args:
            num_prompt_tokens: of the new one.
            num_requests, num_tokens: that are about to join the queue before it.
        Raises:
            QueueFullError: it may not.
        """
        waiting = self.scheduler.waiting
        self._queue_limits.check(num_prompt_tokens, len(waiting) + num_requests, waiting.num_tokens + num_tokens)

    def _needs_tokens(self) -> bool:
        """Whether a draw of the next step depends on tokens that the one in flight draws."""
        return any(r.num_pending_tokens > 0 and r.params.needs_history for r in self.scheduler.running)

    def _launch(self, plan: StepPlan) -> list[RequestDelta]:
        """Start a step; it is in flight then. If it does not start, its requests' last deltas."""
        begin_s = time.monotonic()
        try:
            with self.watch.span("launch"):
                launched = self.runner.launch(plan)
        except Exception as error:
            return self._fail_step(plan, error)
        for item in plan.scheduled:
            if item.request.first_scheduled_s is None:
                item.request.first_scheduled_s = begin_s
        self.scheduler.launched(plan)
        self._in_flight = StepInFlight(plan, launched, begin_s)
        return []

    def _collect(self, step: StepInFlight) -> list[RequestDelta]:
        """Wait for a launched step, and hand out what it gave to those who are still there."""
        try:
            with self.watch.span("collect"):
                sampled = self.runner.collect(step.handle)
            check_row_count(sampled, step.plan)
        except Exception as error:
            return self._fail_step(step.plan, error)
        now_s = time.monotonic()
        self.scheduler.budget.observe(step.plan, now_s - max(self._collected_s, step.begin_s))
        self._collected_s = now_s
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
            self.watch.totals.prompt_tokens += request.num_prompt_tokens
        if request.params.max_tokens == 0:
            return self._finish(request, "length")
        self.watch.totals.generation_tokens += 1
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
        """The runner raised: end the requests of this step, and of one launched behind it, which builds on what this one should
        have left; what waits is untouched, and the engine goes on, unless the error or the runner says that it cannot."""
        if isinstance(error, EngineDeadError):
            raise error
        self.runner.check()
        logger.error("a step with %d requests failed", len(plan.scheduled), exc_info=error)
        message = f"the step failed: {type(error).__name__}: {error}"
        self.scheduler.cache.forget_all()  # pages that nobody has written may be among them
        behind = [] if self._in_flight is None else self._in_flight.plan.scheduled
        return [
            self._finish(item.request, "error", error=message)
            for item in chain(plan.scheduled, behind)
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
        self.watch.end_request(request, reason)
        text += request.detokenizer.flush()
        delta = delta_of(request, text, list(token_ids), logprobs)
        return replace(
            delta, finish_reason=reason, stop_reason=stop_reason, error=error, finish_s=time.monotonic()
        )
