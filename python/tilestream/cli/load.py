"""A load of requests on an engine, and what is said of it: throughput, time to first token, time per output token."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilestream.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One answered request; seconds since the load began."""

    sent_s: float
    first_token_s: float
    end_s: float
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What people compare of a load.

    seconds: from the first request sent to the last answer's end.
    ttft: time to first token, from when its request was sent; tpot: time per output token after the first.
    """

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tok_s: float
    total_tok_s: float
    ttft_median_s: float
    ttft_p99_s: float
    tpot_median_s: float


def run_load(
    engine: Engine, prompts: Sequence[Sequence[int]], output_tokens: int, *, requests_per_s: float | None = None
) -> list[RequestTimes]:
    """Send the prompts, step until all are answered.

    Args:
        engine: idle; steps are run here.
        prompts: token ids.
        output_tokens: of each answer.
        requests_per_s: sent evenly at this rate; None: all at once.
    Returns:
        Times in the order of prompts.
    Raises:
        RuntimeError: the engine ended a request early, with its reason.
    """
    from tilestream import SamplingParams

    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    due_s = [0.0 if requests_per_s is None else i / requests_per_s for i in range(len(prompts))]
    first_s = [0.0] * len(prompts)
    answered: dict[int, RequestTimes] = {}
    begin_s = time.perf_counter()
    num_sent = 0
    while len(answered) < len(prompts):
        now_s = time.perf_counter() - begin_s
        while num_sent < len(prompts) and due_s[num_sent] <= now_s:
            engine.add_request(str(num_sent), prompts[num_sent], params)
            num_sent += 1
        if not engine.has_work():
            time.sleep(due_s[num_sent] - now_s)
            continue
        deltas = checked(engine.step())
        now_s = time.perf_counter() - begin_s
        for delta in deltas:
            i = int(delta.request_id)
            if delta.num_output_tokens == 1:
                first_s[i] = now_s
            if delta.finish_reason is not None:
                answered[i] = RequestTimes(due_s[i], first_s[i], now_s, delta.num_output_tokens)
    return [answered[i] for i in range(len(prompts))]


def checked(deltas: list) -> list:
    """The deltas of a step.

    Raises:
        RuntimeError: a request failed, with its reason.
    """
    for delta in deltas:
        if delta.finish_reason in ("error", "abort"):
            raise RuntimeError(f"{delta.request_id}: {delta.error or delta.finish_reason}")
    return deltas


def summarise(times: Sequence[RequestTimes], num_prompt_tokens: int) -> LoadResult:
    """The figures of one load.

    Args:
        times: at least one request, each with at least two output tokens.
        num_prompt_tokens: of all prompts together.
    """
    seconds = max(t.end_s for t in times) - min(t.sent_s for t in times)
    output_tokens = sum(t.num_output_tokens for t in times)
    ttft_s = sorted(t.first_token_s - t.sent_s for t in times)
    return LoadResult(
        num_requests=len(times),
        prompt_tokens=num_prompt_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
        output_tok_s=output_tokens / seconds,
        total_tok_s=(num_prompt_tokens + output_tokens) / seconds,
        ttft_median_s=statistics.median(ttft_s),
        ttft_p99_s=ttft_s[math.ceil(0.99 * len(ttft_s)) - 1],
        tpot_median_s=statistics.median((t.end_s - t.first_token_s) / (t.num_output_tokens - 1) for t in times),
    )
