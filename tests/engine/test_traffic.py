"""Random traffic: whatever comes in whatever order, pages are owned, nobody starves, and no answer changes."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilestream.engine.policies import POLICIES
from tilestream.engine.request import RequestDelta, RequestOptions
from tilestream.engine.step_plan import StepPlan
from tilestream.sampling_params import SamplingParams

from .fakes import expected_output, make_engine, run_all, text_of, tokens_of

CONFIGS = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from((16, 32)),
        "kv_cache_tokens": st.sampled_from((64, 128, 160, 320, 2048)),  # 64: two requests are a crowd
        "token_budget": st.sampled_from((1, 3, 32, 50, 64, 256)),
        "max_num_seqs": st.integers(1, 8),
        "max_model_len": st.sampled_from((40, 200)),
        "enable_prefix_caching": st.booleans(),
        "batch_invariant": st.booleans(),
        "overlaps": st.booleans(),
        "policy": st.sampled_from(POLICIES),
        "tbt_ms": st.sampled_from((None, 1.0, 8.0, 20.0)),  # 1.0: not even an empty step keeps it
    }
)
# Who, how important, and whether its deadline will have passed.
OPTIONS = st.tuples(st.sampled_from(("", "a", "b")), st.integers(-1, 1), st.sampled_from((False, False, False, True)))
# Prompt family, shared tokens, own tokens, max_tokens, greedy.
REQUESTS = st.tuples(
    st.integers(0, 2), st.integers(1, 90), st.integers(0, 40), st.integers(1, 60), st.booleans(), OPTIONS
)
EVENTS = st.one_of(
    st.lists(REQUESTS, min_size=1, max_size=4),  # these come
    st.integers(1, 30),  # so many steps run
    st.tuples(st.sampled_from(("abort", "abort", "fail")), st.integers(0, 99)),
)


def make_prompt(family: int, num_shared: int, num_own: int, name: str) -> list[int]:
    """Prompts of one family share their beginning."""
    rng = random.Random(name)
    return [(family * 80 + i) % 256 for i in range(num_shared)] + [rng.randrange(256) for _ in range(num_own)]


class Traffic:
    """Requests come, steps run, requests leave, steps fail. FakeRunner checks each plan as it runs."""

    def __init__(self, config: dict) -> None:
        self.engine = make_engine(**config)
        self.engine.runner.on_run = self.watch
        self.seeds: dict[str, int] = {}
        self.prompts: dict[str, list[int]] = {}
        self.params: dict[str, SamplingParams] = {}
        self.deltas: dict[str, list[RequestDelta]] = {}
        self.options: dict[str, RequestOptions] = {}
        self.order: dict[str, list[str]] = {}  # of first admission, by tenant

    def watch(self, plan: StepPlan) -> None:
        scheduler = self.engine.scheduler
        admitted = [i.request for i in plan.scheduled if i.request.first_scheduled_s is None]
        for request in admitted:
            self.order.setdefault(request.options.tenant, []).append(request.request_id)
            if scheduler.config.policy == "priority":
                assert all(request.options.priority <= other.options.priority for other in scheduler.waiting)
        ranks = [scheduler.waiting.rank(request) for request in scheduler.running]
        assert ranks == sorted(ranks), "preemption would not take the last"

    def add(
        self, family: int, num_shared: int, num_own: int, max_tokens: int, greedy: bool,
        options: tuple[str, int, bool] = ("", 0, False),
    ) -> None:  # fmt: skip
        config = self.engine.config
        name = str(len(self.prompts))
        prompt = make_prompt(family, num_shared, num_own, name)
        prompt = prompt[: min(config.max_model_len - 1, config.capacity_tokens)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0 if greedy else 1)
        tenant, priority, late = options
        deadline_s = time.monotonic() + (0.01 if late else 1000.0)
        self.options[name] = RequestOptions(tenant=tenant, priority=priority, deadline_s=deadline_s)
        self.engine.add_request(name, prompt, params, self.options[name])
        self.prompts[name], self.params[name], self.deltas[name] = prompt, params, []
        self.seeds[name] = self.engine._requests[name].seed

    def step(self) -> None:
        self.take(self.engine.step())

    def take(self, deltas: list[RequestDelta]) -> None:
        for delta in deltas:
            earlier = self.deltas[delta.request_id]
            assert not earlier or earlier[-1].finish_reason is None, "a delta after the last"
            earlier.append(delta)
        self.engine.scheduler.check_invariants()

    def harm(self, how: str, which: int) -> None:
        unfinished = sorted(self.engine._requests)
        if unfinished and how == "fail":
            fails = "fail_with" if which % 2 == 0 else "fail_collect_with"
            setattr(self.engine.runner, fails, RuntimeError("injected"))
            self.step()
        elif unfinished:
            self.take([self.engine.abort(unfinished[which % len(unfinished)])])

    def finish(self) -> None:
        """Run what is left; every request has ended as it must, with the tokens that it must have."""
        for rest in run_all(self.engine).values():
            self.take(rest)
        if self.engine.config.policy == "fcfs":
            for order in self.order.values():
                assert order == sorted(order, key=int), "not first come first served"
        for name, deltas in self.deltas.items():
            output = tokens_of(deltas)
            assert output == expected_output(self.prompts[name], self.params[name], self.seeds[name], len(output))
            if deltas[-1].finish_reason == "length":
                assert text_of(deltas) == bytes(output).decode()
                config = self.engine.config
                room = min(config.max_model_len, config.capacity_tokens + 1) - len(self.prompts[name])
                assert len(output) == min(self.params[name].max_tokens, room)
            else:
                assert deltas[-1].finish_reason in ("abort", "error")
                if deltas[-1].finish_reason == "abort" and deltas[-1].error is not None:
                    assert "deadline" in deltas[-1].error and deltas[-1].finish_s >= self.options[name].deadline_s


@given(config=CONFIGS, events=st.lists(EVENTS, min_size=1, max_size=20))
def test_any_traffic(config: dict, events: list) -> None:
    traffic = Traffic(config)
    for event in events:
        if isinstance(event, list):
            for request in event:
                traffic.add(*request)
        elif isinstance(event, int):
            for _ in range(event):
                traffic.step()
        else:
            traffic.harm(*event)
    traffic.finish()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_crowded_traffic(seed: int, policy: str, overlaps: bool) -> None:
    """Long outputs in a small cache: requests are preempted all the time, while some leave and some steps fail."""
    rng = random.Random(seed)
    traffic = Traffic({
        "kv_cache_tokens": rng.choice((192, 256)),
        "max_model_len": 200,
        "token_budget": rng.choice((8, 40, 64)),
        "max_num_seqs": 8,
        "enable_prefix_caching": seed % 2 == 0,
        "overlaps": overlaps,
        "policy": policy,
        "tbt_ms": rng.choice((None, 6.0)),
    })  # fmt: skip
    for _ in range(500):
        if rng.random() < 0.15:
            options = rng.choice(("", "a")), rng.randrange(2), rng.random() < 0.1
            traffic.add(
                rng.randrange(2), rng.randint(1, 40), rng.randrange(8), rng.randint(20, 90), rng.random() < 0.5, options
            )
        if rng.random() < 0.02:
            traffic.harm(rng.choice(("abort", "abort", "fail")), rng.randrange(99))
        traffic.step()
    traffic.finish()
    metrics = traffic.engine.metrics
    assert metrics.num_preemptions >= 3
    assert (metrics.prefix_cache_hits > 0) == (seed % 2 == 0)


def answers(**config: object) -> tuple[dict[str, list[int]], int, int]:
    """(tokens by request, preemptions, prefix cache hits) of one fixed load under a configuration."""
    engine = make_engine(**{"kv_cache_tokens": 4096, "max_num_seqs": 16, "seed": 1, **config})
    rng = random.Random(7)
    outputs: dict[str, list[RequestDelta]] = {}
    for index in range(24):
        name = str(index)
        prompt = make_prompt(rng.randrange(3), rng.randint(1, 60), rng.randrange(10), name)
        engine.add_request(name, prompt, SamplingParams(max_tokens=rng.randint(1, 100), temperature=index % 2))
        for delta in engine.step():
            outputs.setdefault(delta.request_id, []).append(delta)
    for name, deltas in run_all(engine).items():
        outputs.setdefault(name, []).extend(deltas)
    metrics = engine.metrics
    return {n: tokens_of(d) for n, d in outputs.items()}, metrics.num_preemptions, metrics.prefix_cache_hits


def test_configurations_change_no_answer() -> None:
    expected, num_preemptions, hits = answers(token_budget=4096, enable_prefix_caching=False)
    assert len(expected) == 24 and num_preemptions == 0 and hits == 0
    for budget in (16, 33, 64, 512):
        assert answers(token_budget=budget, enable_prefix_caching=False)[0] == expected
        cached, _, hits = answers(token_budget=budget)
        assert cached == expected and hits > 0
    for caching in (False, True):
        crowded, num_preemptions, _ = answers(kv_cache_tokens=320, token_budget=64, enable_prefix_caching=caching)
        assert crowded == expected and num_preemptions > 0
    assert answers(max_num_seqs=1)[0] == expected
    for config in ({"policy": "lpm"}, {"policy": "lpm", "kv_cache_tokens": 320}, {"tbt_ms": 6.0}):
        assert answers(**config)[0] == expected
    for config in ({}, {"kv_cache_tokens": 320, "token_budget": 64}):
        assert answers(overlaps=True, **config)[0] == expected


@pytest.mark.parametrize("prompt_tokens", [300, 500])
def test_a_long_prompt_never_delays_a_running_decode(prompt_tokens: int) -> None:
    """Stall-free: the decode gets its token in every single step of the long prefill."""
    engine = make_engine(kv_cache_tokens=2048, token_budget=32)
    engine.add_request("short", [1], SamplingParams(max_tokens=30))
    engine.step()
    engine.add_request("long", [2] * prompt_tokens, SamplingParams(max_tokens=2))
    deltas: list[RequestDelta] = []
    while not any(delta.request_id == "long" for delta in deltas):
        deltas = engine.step()
        assert deltas[0].request_id == "short" and len(deltas[0].token_ids) == 1
    plans = engine.runner.plans[1:]
    assert len(plans) == -(-prompt_tokens // 31)  # and every step but the last fills the budget
    assert all(plan.num_tokens == 32 for plan in plans[:-1])
    assert all(a.scheduled[1].start < b.scheduled[1].start for a, b in pairwise(plans))
