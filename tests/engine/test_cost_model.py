"""The formula, what it affords, the fit, and the measurement of a real model's steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilestream import LLM, SamplingParams
from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import BUILT_IN, CostModel, prefill_pairs
from tilestream.engine.profiler import fit_cost_model, measure_cost_model
from tilestream.engine.scheduler import Scheduler
from tilestream.engine.step_budget import TILE_TOKENS, StepBudget
from tilestream.engine.step_plan import StepPlan

from .fakes import COSTS, make_config, make_engine
from .test_scheduler import make_request, make_scheduler, step


def plan_of(decodes: list[int], chunks: list[tuple[int, int]] = ()) -> StepPlan:
    """decodes: tokens behind each; chunks: (start, tokens)."""
    plan = StepPlan()
    for start, num_new_tokens in [*((context, 1) for context in decodes), *chunks]:
        request = make_request("r", start + num_new_tokens)
        request.num_computed_tokens = start
        plan.add(request, num_new_tokens)
    return plan


def test_a_step_is_counted() -> None:
    plan = plan_of([10, 20], [(100, 3)])
    assert (plan.num_tokens, plan.num_samples, plan.num_prefill_tokens) == (5, 3, 3)
    assert plan.num_decode_keys == 11 + 21
    assert plan.num_prefill_pairs == 101 + 102 + 103 == prefill_pairs(100, 3)
    assert COSTS.step_s(plan) == pytest.approx(2e-3 + 5e-4 + 3e-4 + 32e-6 + 306 * 2e-7)


def test_beyond_the_knee_tokens_cost_more() -> None:
    ten_more = COSTS.seconds(58, 0, 0, 0) - COSTS.seconds(48, 0, 0, 0)
    assert ten_more == pytest.approx(10 * 1.5e-4)
    assert COSTS.seconds(48, 0, 0, 0) - COSTS.seconds(38, 0, 0, 0) == pytest.approx(10 * 1e-4)


@given(
    decodes=st.lists(st.integers(0, 5000), max_size=20),
    start=st.integers(0, 5000),
    most=st.integers(1, 600),
    target_ms=st.floats(0.1, 100),
)
def test_affordable_tokens_is_the_largest_that_fits(decodes: list[int], start: int, most: int, target_ms: float) -> None:
    plan = plan_of(decodes)

    def fits(num_tokens: int) -> bool:
        pairs = prefill_pairs(start, num_tokens)
        counts = plan.num_tokens + num_tokens, plan.num_samples + 1, plan.num_decode_keys, pairs
        return COSTS.seconds(*counts) <= target_ms / 1e3

    found = COSTS.affordable_tokens(plan, start, most, target_ms / 1e3)
    assert found == max((n for n in range(1, most + 1) if fits(n)), default=0)


@given(
    num_decodes=st.integers(0, 60),
    start=st.integers(0, 4000),
    num_uncomputed=st.integers(2, 600),
    target_ms=st.floats(0.1, 60),
    token_budget=st.integers(64, 512),
)
def test_a_chunk_keeps_the_target_or_is_one_tile(
    num_decodes: int, start: int, num_uncomputed: int, target_ms: float, token_budget: int
) -> None:
    budget = StepBudget(make_config(tbt_ms=target_ms, token_budget=token_budget), COSTS)
    plan = plan_of([50] * num_decodes)
    chunk = budget.chunk_tokens(plan, start, num_uncomputed, 10_000)
    room = min(token_budget - num_decodes, num_uncomputed)
    assert min(TILE_TOKENS, room) <= chunk <= room
    with_chunk = plan_of([50] * num_decodes, [(start, chunk)])
    assert chunk <= TILE_TOKENS or COSTS.step_s(with_chunk) <= target_ms / 1e3
    if TILE_TOKENS < chunk < num_uncomputed:
        assert (num_decodes + chunk) % TILE_TOKENS == 0, "the cut is no tile border"


def test_chunks_shrink_as_their_context_grows_and_end_in_time() -> None:
    """A prompt of 4000 tokens in steps of 40 ms: its first chunks are large, and each but a tile keeps the target."""
    limits = {"kv_cache_tokens": 8192, "max_model_len": 8192, "token_budget": 512, "tbt_ms": 40.0}
    scheduler = Scheduler(make_config(enable_prefix_caching=False, **limits), COSTS)
    scheduler.add(make_request("decode", 5))
    step(scheduler)
    scheduler.add(make_request("long", 4000))
    chunks = []
    while sum(chunks) < 4000:
        plan = scheduler.schedule()
        chunks.append(plan.num_prefill_tokens)
        assert plan.scheduled[0].num_new_tokens == 1 and COSTS.step_s(plan) <= 40e-3
        scheduler.launched(plan)
        for item in plan.scheduled:
            if item.samples:
                item.request.token_ids[-1], item.request.num_pending_tokens = 0, 0
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True) and chunks[0] > 5 * min(chunks[:-1])


def test_a_machine_that_got_slower_gets_smaller_chunks_until_it_is_fast_again() -> None:
    budget = StepBudget(make_config(tbt_ms=40.0, token_budget=512), COSTS)
    step_of = plan_of([50] * 4, [(0, 64)])
    first = budget.chunk_tokens(plan_of([50] * 4), 0, 5000, 10_000)
    budget.observe(step_of, 100 * COSTS.step_s(step_of))  # a hiccup
    assert budget.slowdown == pytest.approx(1.3)
    for _ in range(60):
        budget.observe(step_of, 2 * COSTS.step_s(step_of))
    assert budget.slowdown == pytest.approx(2.0, abs=0.01)
    slow = budget.chunk_tokens(plan_of([50] * 4), 0, 5000, 10_000)
    assert 2 * COSTS.step_s(plan_of([50] * 4, [(0, slow)])) <= 40e-3 and slow < first
    for _ in range(60):
        budget.observe(step_of, 0.5 * COSTS.step_s(step_of))
    assert budget.slowdown == 1.0 and budget.chunk_tokens(plan_of([50] * 4), 0, 5000, 10_000) == first
    budget.observe(plan_of([50] * 4), 1.0)  # no prefill: says nothing of chunks
    assert budget.slowdown == 1.0


def test_the_engine_observes_its_steps() -> None:
    engine = make_engine(tbt_ms=5.0)
    launch = engine.runner.launch
    engine.runner.launch = lambda plan: (time.sleep(0.03), launch(plan))[1]
    engine.add_request("r", [1] * 200, SamplingParams(max_tokens=1))
    while engine.has_work():
        engine.step()
    assert engine.scheduler.budget.slowdown > 1.3


def test_prefills_do_not_starve_under_a_target_that_cannot_be_kept() -> None:
    requests = [make_request(name, 64) for name in "ab"]
    scheduler = Scheduler(make_config(tbt_ms=0.001), COSTS)
    for request in requests:
        scheduler.add(request)
    assert [step(scheduler) for _ in range(3)] == [{"a": 32}, {"a": 32}, {"a": 1, "b": 32}]


def test_without_a_target_the_cost_model_changes_nothing() -> None:
    request = make_request("a", 100)
    scheduler = make_scheduler(request)
    assert step(scheduler) == {"a": 64}
    with pytest.raises(ValueError, match="tbt_ms is 5: that needs a cost model"):
        Scheduler(make_config(tbt_ms=5))


@pytest.mark.parametrize("changes", [{"tbt_ms": 0}, {"tbt_ms": float("nan")}, {"policy": "lifo"}, {"max_queued_tokens": 0}])
def test_bad_limits_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_config(**changes)


STEPS = [
    plan_of([100]), plan_of([2000]), plan_of([100] * 8), plan_of([900] * 8), plan_of([50] * 32), plan_of([], [(0, 64)]),
    plan_of([], [(0, 128)]), plan_of([], [(0, 256)]), plan_of([], [(2000, 128)]), plan_of([], [(1000, 256)]),
    plan_of([200] * 16, [(500, 48)]), plan_of([], [(0, 512)]),
]  # fmt: skip


def test_the_fit_finds_the_formula() -> None:
    true = CostModel(
        fixed_s=2e-3, token_s=1e-4, dense_token_s=3e-4, knee_tokens=128, sample_s=2e-4, kv_token_s=1e-6, pair_s=5e-8
    )
    found = fit_cost_model(STEPS, [true.step_s(step) for step in STEPS], source="test")
    assert found.knee_tokens == 128 and found.source == "test"
    for name in ("fixed_s", "token_s", "dense_token_s", "sample_s", "kv_token_s", "pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4)


def test_the_fit_of_noise_has_no_negative_coefficient() -> None:
    times_s = [5e-3 * (1 + 0.3 * (-1) ** i) for i in range(len(STEPS))]
    found = fit_cost_model(STEPS, times_s, source="test")  # CostModel refuses negative ones
    assert found.seconds(1, 0, 0, 0) > 0


def test_a_cost_model_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert CostModel.load(path) == COSTS
    for text in ("{}", "no json", '{"fixed_s": -1, "token_s": 0, "sample_s": 0, "kv_token_s": 0, "pair_s": 0}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"costs\.json is no cost model"):
            CostModel.load(path)


def test_the_built_in_model_says_that_it_is_an_estimate_and_is_plausible() -> None:
    model = BUILT_IN["estimate-h200-llama3-8b"]
    assert "estimate" in model.source and "nothing measured" in model.source
    assert model.fixed_s == pytest.approx(0.3e-3 + 15e9 / 3.84e12)  # reads the weights
    prompt_s = model.seconds(8192, 1, 0, prefill_pairs(0, 8192))
    assert 8192 * 15e9 / 989e12 < prompt_s < 4 * 8192 * 15e9 / 989e12  # between the data sheet's roof and a quarter of it


def test_a_cache_too_small_to_measure_in_says_so() -> None:
    config = EngineConfig(kv_cache_tokens=32, max_model_len=32, token_budget=4, tbt_ms=5)
    with pytest.raises(RuntimeError, match="cannot be measured with a KV cache of 32 tokens"):
        measure_cost_model(None, None, config)


def test_measuring_a_real_model_leaves_no_trace() -> None:
    limits = {"kv_cache_tokens": 2048, "max_model_len": 512, "token_budget": 128, "seed": 0}
    begin_s = time.perf_counter()
    plain = LLM(**limits)
    load_s = time.perf_counter() - begin_s
    measured = LLM(tbt_ms=50, **limits)
    engine, costs = measured.engine, measured.engine.cost_model
    assert costs.source == "measured at start-up" and plain.engine.cost_model is None
    assert 0 < costs.seconds(1, 1, 64, 0) < costs.seconds(128, 1, 0, prefill_pairs(0, 128)) < load_s + 60
    assert engine.scheduler.pool.num_free_pages == engine.config.num_pages
    assert engine.scheduler.cache.num_cached_pages == 0
    assert engine.metrics == plain.engine.metrics
    caches = engine.runner.kv_caches
    assert all(float(tensor[:4].float().abs().max()) == 0 for cache in caches for tensor in (cache.k_cache, cache.v_cache))
    params = SamplingParams(max_tokens=8, temperature=1.0)
    prompt = "The tide comes in"
    assert measured.generate(prompt, params)[0].token_ids == plain.generate(prompt, params)[0].token_ids
