"""What a simulation amounts to: latencies, throughput, and the goodput within limits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tilestream.engine.simulator import SimulatedRequest, Simulation

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """Figures of one simulation; seconds are virtual but for wall_s.

    Args:
        ttft_s: time to first token; tpot_s: time per output token after the first, a mean by request; tbt_s: time between
            two tokens, every one of every request: each at QUANTILES, nan if there is none.
        within_share: of all requests, refused ones included, those within both limits.
        goodput_req_s: such requests per second.
    """

    num_requests: int
    num_refused: int
    seconds: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    tbt_s: tuple[float, ...]
    requests_s: float
    output_tok_s: float
    total_tok_s: float
    within_share: float
    goodput_req_s: float
    num_preemptions: int
    cache_hit_share: float
    num_steps: int
    wall_s: float


def summarise(simulation: Simulation, *, ttft_limit_s: float, tpot_limit_s: float) -> SimulationReport:
    """The figures of a simulation, by these limits of TTFT and TPOT."""
    finished, seconds = simulation.finished, simulation.seconds or 1e-9
    num_requests = len(finished) + simulation.refused
    output_tokens = sum(num_output_tokens(request) for request in finished)
    prompt_tokens = sum(request.num_prompt_tokens for request in finished)
    within = sum(ttft(request) <= ttft_limit_s and (tpot(request) or 0.0) <= tpot_limit_s for request in finished)
    tpots_s = [value for value in map(tpot, finished) if value is not None]
    return SimulationReport(
        num_requests=num_requests,
        num_refused=simulation.refused,
        seconds=seconds,
        ttft_s=quantiles((ttft(request), 1) for request in finished),
        tpot_s=quantiles((value, 1) for value in tpots_s),
        tbt_s=quantiles(simulation.gaps_s),
        requests_s=len(finished) / seconds,
        output_tok_s=output_tokens / seconds,
        total_tok_s=(prompt_tokens + output_tokens) / seconds,
        within_share=within / num_requests,
        goodput_req_s=within / seconds,
        num_preemptions=simulation.num_preemptions,
        cache_hit_share=simulation.prefix_cache_hits / max(1, simulation.prefix_cache_queries),
        num_steps=simulation.num_steps,
        wall_s=simulation.wall_s,
    )


def num_output_tokens(request: SimulatedRequest) -> int:
    return request.max_num_tokens - request.num_prompt_tokens


def ttft(request: SimulatedRequest) -> float:
    return request.first_token_s - request.arrival_s


def tpot(request: SimulatedRequest) -> float | None:
    """None for a request of one token."""
    num_gaps = num_output_tokens(request) - 1
    return (request.last_token_s - request.first_token_s) / num_gaps if num_gaps else None


def quantiles(weighted: Iterable[tuple[float, int]]) -> tuple[float, ...]:
    """The values that QUANTILES of the weight lie at or below."""
    values = sorted(weighted)
    total = sum(weight for _, weight in values)
    found, below = [], 0
    wanted = list(QUANTILES)
    for value, weight in values:
        below += weight
        while wanted and below >= wanted[0] * total:
            found.append(value)
            wanted.pop(0)
    return tuple(found) if values else (math.nan,) * len(QUANTILES)


def table(report: SimulationReport, *, ttft_limit_s: float, tpot_limit_s: float) -> str:
    """The figures, for people."""
    def row(name: str, values: tuple[float, ...], unit: str, scale: float) -> str:
        return f"{name:<28}" + "".join(f"{value * scale:>12.2f}" for value in values) + f"  {unit}"

    lines = [
        f"{'':<28}{'p50':>12}{'p90':>12}{'p99':>12}",
        row("time to first token", report.ttft_s, "s", 1.0),
        row("time per output token", report.tpot_s, "ms", 1e3),
        row("time between tokens", report.tbt_s, "ms", 1e3),
        "",
        f"{'requests':<28}{report.num_requests:>12}  {report.num_refused} refused",
        f"{'throughput':<28}{report.requests_s:>12.2f}  requests/s, {report.output_tok_s:.0f} output tokens/s, "
        f"{report.total_tok_s:.0f} with prompts",
        f"{'goodput':<28}{report.goodput_req_s:>12.2f}  requests/s with TTFT <= {ttft_limit_s:g} s and TPOT <= "
        f"{tpot_limit_s * 1e3:g} ms: {report.within_share:.1%}",
        f"{'preemptions':<28}{report.num_preemptions:>12}",
        f"{'prefix cache':<28}{report.cache_hit_share:>12.1%}  of prompt tokens",
        f"{'simulated':<28}{report.num_steps:>12}  steps, {report.seconds:.0f} s in {report.wall_s:.1f} s: "
        f"{report.num_steps / report.wall_s:.0f} steps/s, {report.num_requests / report.wall_s:.0f} requests/s",
    ]
    return "\n".join(lines)
