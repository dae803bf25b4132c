"""The engine's Python per step: scheduling, paging and reading tokens, with a runner that takes no time

A runner that gives constant tokens at once: what is timed is Engine.step() and nothing of the model. Decodes hold 256 tokens
each. "lpm" with a queue asks the prefix cache for the front of the queue in every step, and admits nobody.
"""

from __future__ import annotations

import time

import pytest

from tilestream import SamplingParams
from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.engine import Engine
from tilestream.engine.request import RequestOptions
from tilestream.engine.step_plan import SampledTokens, StepPlan

STEPS = 300
CONTEXT_TOKENS = 256
COSTS = CostModel(fixed_s=1e-3, token_s=1e-4, sample_s=1e-5, kv_token_s=1e-8, pair_s=1e-8)


class InstantRunner:
    """Draws token 1, always."""

    vocab_size = 50_000
    overlaps = False

    def launch(self, plan: StepPlan) -> SampledTokens:
        return SampledTokens([1] * plan.num_samples)

    def collect(self, launched: SampledTokens) -> SampledTokens:
        return launched


class OneByteTokenizer:
    """Every token is an a."""

    eos_token_ids = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


def decoding_engine(num_decodes: int, **changes: object) -> Engine:
    limits = {"kv_cache_tokens": 1 << 20, "max_model_len": 1 << 17, "max_num_seqs": 512, "token_budget": 2048}
    config = EngineConfig(**{**limits, "max_queued_requests": 20_000, **changes})
    engine = Engine(InstantRunner(), OneByteTokenizer(), config, COSTS)
    for index in range(num_decodes):
        prompt = [index] * CONTEXT_TOKENS
        options = RequestOptions(tenant=str(index % 4))
        engine.add_request(f"decode-{index}", prompt, SamplingParams(max_tokens=None, ignore_eos=True), options)
    while engine.num_waiting or any(request.num_uncomputed_tokens > 1 for request in engine.scheduler.running):
        engine.step()
    return engine


def step_times(engine: Engine) -> list[float]:
    times_s = []
    for _ in range(STEPS):
        start_s = time.perf_counter()
        engine.step()
        times_s.append(time.perf_counter() - start_s)
    return times_s


@pytest.mark.parametrize("num_decodes", [1, 32, 256])
def test_decodes(num_decodes: int, report) -> None:
    report.add("decodes", str(num_decodes), {"ours": step_times(decoding_engine(num_decodes))}, limit="goal 1 ms at 32")


def test_decodes_and_a_prompt_under_a_target(report) -> None:
    engine = decoding_engine(32, tbt_ms=10.0)
    engine.add_request("prompt", [7] * 100_000, SamplingParams(max_tokens=1))
    times_s = step_times(engine)
    assert engine.scheduler.running[-1].num_uncomputed_tokens > 1
    report.add("decodes and a prompt, tbt_ms", "32 + a chunk", {"ours": times_s})


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_long_queue(policy: str, report) -> None:
    """Nobody who waits fits into the pages that are left."""
    capacity_tokens = 32 * (CONTEXT_TOKENS + STEPS + 64)
    engine = decoding_engine(32, policy=policy, kv_cache_tokens=capacity_tokens)
    for index in range(1000):
        prompt = [index % 32] * (CONTEXT_TOKENS - 32) + [9] * capacity_tokens
        engine.add_request(f"waits-{index}", prompt[: capacity_tokens - 32], SamplingParams(max_tokens=1))
    times_s = step_times(engine)
    assert engine.num_waiting == 1000
    report.add("decodes, 1,000 wait", f"32, {policy}", {"ours": times_s})


def test_one_request_joins_and_leaves_a_long_queue(report) -> None:
    engine = decoding_engine(1, max_num_seqs=1)
    for index in range(10_000):
        engine.add_request(f"waits-{index}", [1] * 8, SamplingParams(max_tokens=1))
    times_s = []
    for index in range(STEPS):
        start_s = time.perf_counter()
        engine.add_request("one", [1] * 8, SamplingParams(max_tokens=1))
        engine.abort("one" if index % 2 else f"waits-{index}")
        times_s.append(time.perf_counter() - start_s)
        if index % 2 == 0:
            engine.abort("one")
    report.add("a request joins, another leaves", "10,000 wait", {"ours": times_s})
