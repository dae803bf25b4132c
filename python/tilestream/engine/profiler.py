"""Measures a runner's steps at start-up, and fits the cost model to them.

Some steps of made-up tokens run on the first pages of the KV cache, before any request owns one; those pages are cleared
before, so that reading them is reading real memory, and after. No pool, prefix cache or counter knows of it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.detokenizer import Detokenizer
from tilestream.engine.protocols import EngineTokenizer, Runner
from tilestream.engine.request import Request
from tilestream.engine.step_plan import StepPlan
from tilestream.sampling_params import SamplingParams

_ROUNDS = 5  # timed ones of a step; the median of them counts
_SECONDS = 2.0  # for all steps together, in even shares; each runs once, whatever that takes, while there is time


@dataclass(frozen=True, slots=True)
class _Case:
    """A step: decodes with `context` tokens behind them, and a chunk behind `start` tokens."""

    num_decodes: int = 0
    context: int = 0
    chunk: int = 0
    start: int = 0


# The quick ones first. Together they tell the formula's terms apart: decodes at two contexts (K), chunks at two starts (P), at
# several sizes (T and the knee), and with decodes beside them (S). The first _ENOUGH of them do, in a pinch.
_CASES = (
    _Case(num_decodes=1, context=128),
    _Case(num_decodes=1, context=2048),
    _Case(num_decodes=8, context=128),
    _Case(num_decodes=8, context=1024),
    _Case(num_decodes=32, context=64),
    _Case(num_decodes=32, context=512),
    _Case(chunk=32),
    _Case(chunk=64, start=512),
    _Case(chunk=128),
    _Case(num_decodes=16, context=256, chunk=48, start=512),
    _Case(chunk=128, start=2048),
    _Case(num_decodes=16, context=256, chunk=112, start=1024),
    _Case(chunk=256),
    _Case(chunk=256, start=1024),
    _Case(chunk=512),
    _Case(chunk=1024),
    _Case(chunk=2048),
)
_ENOUGH = 11


def measure_cost_model(runner: Runner, tokenizer: EngineTokenizer, config: EngineConfig) -> CostModel:
    """The cost model of a runner, from its own steps: a few of them, for about 2 seconds.

    Args:
        runner: idle, as before its first request.
        tokenizer: of the engine.
        config: its limits; what does not fit them is not tried.
    Raises:
        RuntimeError: the limits leave too few different steps to fit a formula to.
    """
    steps = [_step(case, runner, tokenizer, config) for case in _CASES if _fits(case, config)]
    if len(steps) < 3:
        raise RuntimeError(
            f"a step's cost cannot be measured with a KV cache of {config.capacity_tokens} tokens, max_model_len "
            f"{config.max_model_len} and token_budget {config.token_budget}; give larger ones, or no tbt_ms"
        )
    num_pages = max(1 + max(item.request.pages[-1] for item in step.scheduled) for step in steps)
    runner.clear_pages(num_pages)
    times_s: list[float] = []
    begin_s = time.perf_counter()
    for step in steps:
        if len(times_s) >= _ENOUGH and time.perf_counter() - begin_s > _SECONDS:
            break
        times_s.append(_median_s(runner, step, _SECONDS / len(steps)))
    runner.clear_pages(num_pages)
    return fit_cost_model(steps[: len(times_s)], times_s, source="measured at start-up")


def _median_s(runner: Runner, step: StepPlan, most_s: float) -> float:
    """How long a step takes: the median of as many runs as begin within most_s; the first, if there are more, warms up."""
    times_s: list[float] = []
    begin_s = time.perf_counter()
    while not times_s or (len(times_s) <= _ROUNDS and time.perf_counter() - begin_s < most_s):
        start_s = time.perf_counter()
        runner.collect(runner.launch(step))
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:] or times_s)


def fit_cost_model(steps: Sequence[StepPlan], times_s: Sequence[float], *, source: str) -> CostModel:
    """The coefficients with the least squared relative error.

    Args:
        steps: what ran.
        times_s: how long each took.
        source: see CostModel.
    """
    relative = 1.0 / np.asarray(times_s)
    best: tuple[float, np.ndarray, int] | None = None
    for knee in (0, *sorted({step.num_tokens for step in steps})[1:-1]):
        rows = [
            (1, step.num_tokens, max(0, step.num_tokens - knee) if knee else 0, step.num_samples, step.num_decode_keys,
             step.num_prefill_pairs)
            for step in steps
        ]  # fmt: skip
        coefficients, error = _non_negative_least_squares(np.array(rows) * relative[:, None])
        if best is None or error < best[0]:
            best = error, coefficients, knee
    fixed, token, dense, sample, kv_token, pair = (float(c) for c in best[1])
    return CostModel(
        fixed_s=fixed, token_s=token, dense_token_s=dense, knee_tokens=best[2] if dense else 0,
        sample_s=sample, kv_token_s=kv_token, pair_s=pair, source=source,
    )  # fmt: skip


def _non_negative_least_squares(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """x >= 0 with the least |rows x - 1|^2, and that: the best of all choices of columns that may be above 0."""
    num_columns = rows.shape[1]
    best, best_error = np.zeros(num_columns), float(len(rows))
    for size in range(1, num_columns + 1):
        for chosen in itertools.combinations(range(num_columns), size):
            columns = rows[:, chosen]
            scale = np.linalg.norm(columns, axis=0)
            if not scale.all():
                continue
            x = np.linalg.lstsq(columns / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(np.square(columns @ x - 1).sum())
            if (x >= 0).all() and error < best_error * (1 - 1e-9):
                best_error = error
                best = np.zeros(num_columns)
                best[list(chosen)] = x
    return best, best_error


def _fits(case: _Case, config: EngineConfig) -> bool:
    longest = max(case.context + 1 if case.num_decodes else 0, case.start + case.chunk)
    num_pages = case.num_decodes * _num_pages(case.context + 1, config) + _num_pages(case.start + case.chunk, config)
    return (
        longest < config.max_request_tokens
        and num_pages <= config.num_pages
        and case.num_decodes + case.chunk <= config.token_budget
        and case.num_decodes + (case.chunk > 0) <= config.max_running_requests
    )


def _num_pages(num_tokens: int, config: EngineConfig) -> int:
    return -(-num_tokens // config.page_size)


def _step(case: _Case, runner: Runner, tokenizer: EngineTokenizer, config: EngineConfig) -> StepPlan:
    plan = StepPlan()
    lengths = [(case.context, 1)] * case.num_decodes + [(case.start, case.chunk)] * (case.chunk > 0)
    next_page = 0
    for index, (start, num_new_tokens) in enumerate(lengths):
        num_tokens = start + num_new_tokens
        request = Request(
            request_id=f"profile-{index}",
            token_ids=[i % runner.vocab_size for i in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            params=SamplingParams(temperature=0.0),
            seed=0,
            detokenizer=Detokenizer(tokenizer, ()),
            arrival_s=0.0,
            max_num_tokens=num_tokens + 1,
        )
        request.num_computed_tokens = start
        request.pages = list(range(next_page, next_page + _num_pages(num_tokens, config)))
        next_page += len(request.pages)
        plan.add(request, num_new_tokens)
    return plan
