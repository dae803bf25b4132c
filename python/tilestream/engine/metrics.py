"""Counters and gauges of an engine, and its last steps, as plain numbers; the server makes them Prometheus'."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilestream.engine.request import FinishReason, Request
    from tilestream.engine.scheduler import Scheduler
    from tilestream.engine.step_plan import StepPlan
    from tilestream.engine.trace import Trace

Span = tuple[str, float, float]  # name; begin and end, seconds of time.monotonic()

# Upper bounds of the classes in which steps are counted by their tokens; the last class has none.
STEP_TOKENS_BOUNDS = tuple(2**i for i in range(15))
_NUM_STEPS_KEPT = 1024


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """What one step did.

    prefill_tokens: of prompts, and those computed again after a preemption; decode_tokens: one per running answer.
    budget_tokens: the most the step might have had.
    num_running: requests in it; num_waiting, kv_cache_usage: at its end.
    spans: parts of the step: "schedule", "launch" and "collect"; the rest of its time is spent on its tokens.
        With a runner that overlaps, "collect" waits for the step before.
    """

    index: int
    begin_s: float  # of time.monotonic()
    end_s: float
    prefill_tokens: int
    decode_tokens: int
    budget_tokens: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    spans: Sequence[Span] = ()

    @property
    def num_tokens(self) -> int:
        return self.prefill_tokens + self.decode_tokens

    def seconds(self, *names: str) -> float:
        """Time spent in the spans of these names."""
        return sum(end_s - begin_s for name, begin_s, end_s in self.spans if name in names)


class StepLog:
    """The last steps, for whoever watches the batch. Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=_NUM_STEPS_KEPT)

    def add(self, step: StepRecord) -> None:
        self._steps.append(step)

    def since(self, index: int) -> list[StepRecord]:
        """Steps with this index or a later one, oldest first, as far as they are kept."""
        return [step for step in tuple(self._steps) if step.index >= index]

    @property
    def next_index(self) -> int:
        """Of the step that comes next."""
        steps = tuple(self._steps)
        return steps[-1].index + 1 if steps else 0


@dataclass(slots=True)
class EngineMetrics:
    """Totals count from the engine's start. The engine hands out copies."""

    # Gauges: as of the snapshot.
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of pages owned by requests, 0..1; reusable cached pages count as free

    # Totals.
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up, at a request's first admission
    prefix_cache_hits: int = 0  # tokens found
    prompt_tokens: int = 0  # of requests that reached their first token, cached ones included
    generation_tokens: int = 0
    finished_requests: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
    num_steps: int = 0
    step_tokens: int = 0  # tokens computed by all steps
    prefill_tokens: int = 0  # of these, see StepRecord
    decode_tokens: int = 0
    budget_tokens: int = 0  # what all steps might have had
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS_BOUNDS) + 1))
    step_time_s: float = 0.0  # scheduling, the runner, postprocessing
    schedule_time_s: float = 0.0  # of that, planning
    runner_time_s: float = 0.0  # of that, the runner

    # The last step.
    last_step_tokens: int = 0
    last_step_time_s: float = 0.0
    last_step_budget_tokens: int = 0

    def count_step(self, step: StepRecord) -> None:
        step_time_s = step.end_s - step.begin_s
        self.num_steps += 1
        self.step_tokens += step.num_tokens
        self.prefill_tokens += step.prefill_tokens
        self.decode_tokens += step.decode_tokens
        self.budget_tokens += step.budget_tokens
        self.steps_by_tokens[bisect_left(STEP_TOKENS_BOUNDS, step.num_tokens)] += 1
        self.step_time_s += step_time_s
        self.schedule_time_s += step.seconds("schedule")
        self.runner_time_s += step.seconds("launch", "collect")
        self.last_step_tokens = step.num_tokens
        self.last_step_time_s = step_time_s
        self.last_step_budget_tokens = step.budget_tokens


class EngineWatch:
    """Counts what an engine does, keeps its last steps, and writes its trace while one is open.

    Attributes:
        totals: since the start, without what the scheduler knows: snapshot() has all.
        steps: the last ones.
        trace: where steps and ended requests are written, or None.
    """

    def __init__(self) -> None:
        self.totals = EngineMetrics()
        self.steps = StepLog()
        self.trace: Trace | None = None
        self._begin_s = 0.0
        self._spans: list[Span] = []

    def begin_step(self) -> float:
        """The time, of time.monotonic()."""
        self._begin_s, self._spans = time.monotonic(), []
        return self._begin_s

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A part of the step in progress."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self._spans.append((name, begin_s, time.monotonic()))

    def end_step(self, plan: StepPlan, budget_tokens: int, scheduler: Scheduler) -> StepRecord:
        num_decodes = _count_decodes(plan)
        step = StepRecord(
            index=self.totals.num_steps,
            begin_s=self._begin_s,
            end_s=time.monotonic(),
            prefill_tokens=plan.num_tokens - num_decodes,
            decode_tokens=num_decodes,
            budget_tokens=budget_tokens,
            num_running=len(plan.scheduled),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.num_owned_pages / scheduler.pool.num_pages,
            spans=self._spans,
        )
        self.totals.count_step(step)
        self.steps.add(step)
        if self.trace is not None:
            self.trace.step(step)
        return step

    def end_request(self, request: Request, reason: FinishReason) -> None:
        self.totals.finished_requests[reason] += 1
        if self.trace is not None:
            self.trace.request(request, reason)

    def snapshot(self, scheduler: Scheduler) -> EngineMetrics:
        """May be called by any thread."""
        return replace(
            self.totals,
            finished_requests=dict(self.totals.finished_requests),
            steps_by_tokens=list(self.totals.steps_by_tokens),
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.num_owned_pages / scheduler.pool.num_pages,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
        )


def _count_decodes(plan: StepPlan) -> int:
    """Requests of a step that are past their prompt and one token behind."""
    return sum(item.num_new_tokens == 1 and item.start >= item.request.num_prompt_tokens for item in plan.scheduled)
