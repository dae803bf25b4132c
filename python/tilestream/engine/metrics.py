"""Counters and gauges of an engine, as plain numbers; the server gives them their Prometheus form."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    step_time_s: float = 0.0  # scheduling, the runner, postprocessing
    runner_time_s: float = 0.0  # of that, the runner

    # The last step.
    last_step_tokens: int = 0
    last_step_time_s: float = 0.0

    def count_step(self, num_tokens: int, runner_time_s: float, step_time_s: float) -> None:
        """A step has run."""
        self.num_steps += 1
        self.step_tokens += num_tokens
        self.step_time_s += step_time_s
        self.runner_time_s += runner_time_s
        self.last_step_tokens = num_tokens
        self.last_step_time_s = step_time_s
