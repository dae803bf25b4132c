"""Prometheus metrics. Names and meanings are vLLM's, under the prefix `tilestream:`.

What the engine counts is read when Prometheus asks; times are measured here, where a client sees them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tilestream.engine.metrics import STEP_TOKENS_BOUNDS
from tilestream.server.context import current

if TYPE_CHECKING:
    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.engine.metrics import EngineMetrics
    from tilestream.engine.request import RequestDelta

PREFIX = "tilestream:"

# Seconds. First tokens: from a warm prefix on a GPU to a full context on a CPU. Between tokens: one step.
_TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_LENGTH_BUCKETS_TOKENS = tuple(float(2**i) for i in range(18))  # 1 .. 131072

# Name, meaning, and where the engine's snapshot has it.
_GAUGES = (
    ("num_requests_running", "Requests in the running batch.", "num_requests_running"),
    ("num_requests_waiting", "Requests in the queue.", "num_requests_waiting"),
    ("kv_cache_usage_perc", "Share of the KV cache's pages that requests own, 0 to 1.", "kv_cache_usage"),
    ("token_budget", "Most tokens that the last step might have had.", "last_step_budget_tokens"),
)
_COUNTERS = (
    ("num_preemptions", "Requests sent back to the queue for want of pages.", "num_preemptions"),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
    ("prompt_tokens", "Prompt tokens of requests that got a first token, cached ones included.", "prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "generation_tokens"),
    ("step_prefill_tokens", "Tokens of prompts that steps computed, also after a preemption.", "prefill_tokens"),
    ("step_decode_tokens", "Tokens of running answers that steps have computed.", "decode_tokens"),
    ("step_budget_tokens", "Tokens that steps might have computed: their budgets.", "budget_tokens"),
)


class _EngineCollector(Collector):
    """Reads one snapshot of the engine per scrape."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        now: EngineMetrics = self._engine.metrics
        for rows, kind in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, meaning, attribute in rows:
                family = kind(PREFIX + name, meaning, labels=["model_name"])
                family.add_metric([self._model_name], getattr(now, attribute))
                yield family
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Requests that ended, by how.", labels=["model_name", "finished_reason"]
        )
        for reason, count in now.finished_requests.items():
            ended.add_metric([self._model_name, reason], count)
        yield ended
        steps = HistogramMetricFamily(PREFIX + "iteration_tokens_total", "Tokens of a step.", labels=["model_name"])
        bounds = [*map(float, STEP_TOKENS_BOUNDS), "+Inf"]
        buckets = list(zip(map(str, bounds), accumulate(now.steps_by_tokens), strict=True))
        steps.add_metric([self._model_name], buckets, sum_value=now.step_tokens)
        yield steps
        times = CounterMetricFamily(
            PREFIX + "step_seconds", "Time of all steps, by what it was spent on.", labels=["model_name", "part"]
        )
        rest_s = now.step_time_s - now.schedule_time_s - now.runner_time_s
        for part, seconds in (("schedule", now.schedule_time_s), ("runner", now.runner_time_s), ("output", rest_s)):
            times.add_metric([self._model_name, part], seconds)
        yield times


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        registry = CollectorRegistry()
        registry.register(_EngineCollector(engine, model_name))
        ProcessCollector(registry=registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, meaning, ["model_name"], buckets=buckets, registry=registry)
            return made.labels(model_name)

        times, lengths = _REQUEST_BUCKETS_S, _LENGTH_BUCKETS_TOKENS
        self._registry = registry
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS_S)
        self.inter_token = histogram("inter_token_latency_seconds", "Token to next token.", _STEP_BUCKETS_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", times)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "First token to last, by the tokens after the first.",
            _STEP_BUCKETS_S,
        )
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to first step.", times)
        self.prefill_time = histogram("request_prefill_time_seconds", "First step to first token.", times)
        self.decode_time = histogram("request_decode_time_seconds", "First token to last.", times)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a finished request.", lengths)
        self.answer_length = histogram("request_generation_tokens", "Tokens generated for a finished request.", lengths)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestTimer:
    """Turns one engine request's deltas into observations. Made when the request arrives."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._arrival_s = time.monotonic()
        self._last_token_s: float | None = None

    def on_delta(self, delta: RequestDelta) -> None:
        now_s = time.monotonic()
        if delta.token_ids:
            if self._last_token_s is None:
                self._metrics.ttft.observe(now_s - self._arrival_s)
            else:
                self._metrics.inter_token.observe((now_s - self._last_token_s) / len(delta.token_ids))
            self._last_token_s = now_s
        if delta.finish_reason is not None:
            current().last_deltas.append(delta)
        if delta.finish_reason in ("stop", "length"):
            self._on_finish(delta, now_s)

    def _on_finish(self, delta: RequestDelta, now_s: float) -> None:
        self._metrics.e2e.observe(now_s - self._arrival_s)
        self._metrics.prompt_length.observe(delta.num_prompt_tokens)
        self._metrics.answer_length.observe(delta.num_output_tokens)
        if delta.num_output_tokens > 1 and delta.first_token_s is not None and delta.finish_s is not None:
            decode_s = delta.finish_s - delta.first_token_s
            self._metrics.per_token.observe(decode_s / (delta.num_output_tokens - 1))
        phases = (
            (self._metrics.queue_time, delta.arrival_s, delta.first_scheduled_s),
            (self._metrics.prefill_time, delta.first_scheduled_s, delta.first_token_s),
            (self._metrics.decode_time, delta.first_token_s, delta.finish_s),
        )
        for phase, begin_s, end_s in phases:
            if begin_s is not None and end_s is not None:
                phase.observe(end_s - begin_s)
