"""What runs in a step, and who waits: scenarios with known answers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tilestream.engine.scheduler
from tilestream.engine.detokenizer import Detokenizer
from tilestream.engine.request import Request, RequestState
from tilestream.engine.scheduler import Scheduler
from tilestream.engine.step_plan import StepPlan

from .fakes import GREEDY, ByteTokenizer, make_config


def make_request(name: str, tokens: int | list[int]) -> Request:
    """`tokens`: the prompt, or its length (then it shares nothing with other requests)."""
    prompt = [hash((name, i)) % 256 for i in range(tokens)] if isinstance(tokens, int) else tokens
    tokenizer = ByteTokenizer()
    return Request(name, list(prompt), len(prompt), GREEDY, 0, Detokenizer(tokenizer), 0.0, 10_000)


def make_scheduler(*requests: Request, **config: object) -> Scheduler:
    scheduler = Scheduler(make_config(**config))
    for request in requests:
        scheduler.add(request)
    return scheduler


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run one step, drawing token 0 for everyone. Returns the tokens of each request in it."""
    plan = scheduler.schedule()
    finish_step(scheduler, plan)
    return {item.request.request_id: item.num_new_tokens for item in plan.scheduled}


def finish_step(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.launched(plan)
    scheduler.complete(plan)
    for item in plan.scheduled:
        if item.samples:
            item.request.token_ids[-1] = 0
            item.request.num_pending_tokens = 0
    scheduler.check_invariants()


def test_nothing_to_do() -> None:
    assert make_scheduler().schedule() is None


def test_decodes_first_then_prefill_in_chunks_that_fill_the_budget() -> None:
    a, b = make_request("a", 10), make_request("b", 150)
    scheduler = make_scheduler(a, token_budget=64)
    assert step(scheduler) == {"a": 10}
    scheduler.add(b)
    steps = [step(scheduler) for _ in range(4)]
    assert steps == [{"a": 1, "b": 63}] * 2 + [{"a": 1, "b": 24}, {"a": 1, "b": 1}]
    assert list(steps[0]) == ["a", "b"]


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (100, [{"a": 3, "b": 93}, {"a": 1, "b": 95}, {"a": 1, "b": 12}]),  # steps of 96 = 3 tiles
        (8, [{"a": 3, "b": 5}, {"a": 1, "b": 7}]),  # no whole tile in the budget
    ],
)
def test_a_cut_chunk_ends_at_a_whole_tile_of_the_step(budget: int, steps: list[dict[str, int]]) -> None:
    scheduler = make_scheduler(make_request("a", 3), make_request("b", 200), token_budget=budget)
    assert [step(scheduler) for _ in steps] == steps


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    scheduler = make_scheduler(make_request("a", 100), make_request("b", 30), make_request("c", 1), token_budget=128)
    assert step(scheduler) == {"a": 100, "b": 28}
    assert step(scheduler) == {"a": 1, "b": 2, "c": 1}


def test_admission_is_first_come_first_served() -> None:
    """A small request does not slip past a big one that does not fit yet."""
    a, big, small = make_request("a", 100), make_request("big", 100), make_request("small", 3)
    scheduler = make_scheduler(a, big, small, kv_cache_tokens=160, token_budget=256)
    assert step(scheduler) == {"a": 100}
    assert [r.request_id for r in scheduler.waiting] == ["big", "small"]
    scheduler.finish(a)
    assert step(scheduler) == {"big": 100, "small": 3}


def test_max_num_seqs() -> None:
    scheduler = make_scheduler(*[make_request(name, 4) for name in "abc"], max_num_seqs=2)
    assert step(scheduler) == {"a": 4, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 1}
    scheduler.finish(scheduler.running[0])
    assert step(scheduler) == {"b": 1, "c": 4}


def test_no_more_run_than_the_budget_has_tokens() -> None:
    scheduler = make_scheduler(*[make_request(name, 2) for name in "abcdef"], token_budget=4, max_num_seqs=6)
    for _ in range(5):
        step(scheduler)
    assert step(scheduler) == dict.fromkeys("abcd", 1)


def test_a_prompt_is_admitted_only_beside_what_running_prompts_still_need() -> None:
    """16 pages, of which a needs 10 and holds 2 after its first chunk. b's 6 fit, but leave none for a to grow."""
    a, b, c = make_request("a", 160), make_request("b", 96), make_request("c", 80)
    scheduler = make_scheduler(a, b, kv_cache_tokens=256, token_budget=40)
    for _ in range(5):
        assert step(scheduler) == {"a": 32}  # the other 8 tokens of the budget are b's if it came in
        assert b.state is RequestState.WAITING
    scheduler.finish(a)
    assert step(scheduler) == {"b": 32}
    scheduler.finish(b)
    scheduler = make_scheduler(make_request("a", 160), c, kv_cache_tokens=256, token_budget=40)
    assert step(scheduler) == {"a": 32, "c": 8}  # 5 pages: one is left


def test_a_prompt_of_the_whole_cache_runs_alone() -> None:
    a, b = make_request("a", 256), make_request("b", 1)
    scheduler = make_scheduler(a, b, kv_cache_tokens=256, token_budget=128)
    assert [step(scheduler) for _ in range(2)] == [{"a": 128}, {"a": 128}]
    assert scheduler.pool.num_free_pages == 0 and b.state is RequestState.WAITING


@pytest.fixture
def crowded() -> Scheduler:
    """a, b and c own all 6 pages, with their last pages full: each needs a page for its next token."""
    requests = [make_request(name, 16) for name in "abc"]
    scheduler = make_scheduler(*requests, kv_cache_tokens=96, token_budget=64, enable_prefix_caching=False)
    for _ in range(17):
        step(scheduler)
    assert [r.num_computed_tokens for r in requests] == [32, 32, 32] and scheduler.pool.num_free_pages == 0
    return scheduler


def test_the_latest_arrival_is_preempted_to_the_front_and_keeps_its_output(crowded: Scheduler) -> None:
    a, b, c = crowded.running
    crowded.add(make_request("d", 1))
    output = list(c.token_ids)
    assert step(crowded) == {"a": 1, "b": 1}
    assert [r.request_id for r in crowded.waiting] == ["c", "d"]
    assert (c.state, c.pages, c.num_computed_tokens) == (RequestState.WAITING, [], 0)
    assert c.token_ids == output and crowded.num_preemptions == 1
    crowded.finish(a)
    assert step(crowded) == {"b": 1}  # 3 pages are free: c's own, but none for b to grow
    crowded.finish(b)
    assert step(crowded) == {"c": 33, "d": 1}
    assert c.num_cached_tokens == 0


def test_a_decode_that_is_the_latest_preempts_itself() -> None:
    a, b = make_request("a", 10), make_request("b", 16)
    scheduler = make_scheduler(a, b, kv_cache_tokens=48, enable_prefix_caching=False)
    for _ in range(7):
        step(scheduler)
    b_tokens = b.num_tokens  # a: 16 of 16 slots, b: 22 of 32, no page free
    assert scheduler.pool.num_free_pages == 0
    assert step(scheduler) == {"a": 1} and b.state is RequestState.WAITING and b.num_tokens == b_tokens
    c_plan = scheduler.schedule()
    assert [item.request.request_id for item in c_plan.scheduled] == ["a"]  # b needs 2 pages and one to grow


def test_a_prefill_never_takes_pages_from_a_decode() -> None:
    a, b, c = make_request("a", 64), make_request("b", 16), make_request("c", 16)
    scheduler = make_scheduler(a, b, c, kv_cache_tokens=128, token_budget=32, enable_prefix_caching=False)
    step(scheduler)
    # As if a had been preempted and come back while b and c went on: everything else is theirs.
    for request in (b, c):
        scheduler.waiting.remove(request)
        scheduler.running.append(request)
        request.state = RequestState.RUNNING
        request.pages, request.cache_node = scheduler.cache.acquire([])
        request.pages += scheduler.pool.allocate(3)
        request.num_computed_tokens = 20
        request.token_ids += [0] * 5
    assert step(scheduler) == {"b": 1, "c": 1}
    scheduler.finish(b)
    assert step(scheduler) == {"c": 1, "a": 31}


def test_a_prefill_takes_pages_from_later_prefills() -> None:
    a, b = make_request("a", 64), make_request("b", 64)
    scheduler = make_scheduler(a, kv_cache_tokens=64, token_budget=32, enable_prefix_caching=False)
    step(scheduler)
    b.pages, b.cache_node = scheduler.cache.acquire([])
    b.pages += scheduler.pool.allocate(2)
    b.num_computed_tokens, b.state = 32, RequestState.RUNNING
    scheduler.running.append(b)
    assert step(scheduler) == {"a": 32}
    assert b.state is RequestState.WAITING and scheduler.num_preemptions == 1


def test_full_pages_are_shared_as_soon_as_they_are_computed() -> None:
    prompt = list(range(100))
    a, b = make_request("a", prompt), make_request("b", [*prompt[:70], *[255] * 10])
    scheduler = make_scheduler(a, token_budget=64)
    step(scheduler)
    scheduler.add(b)
    assert step(scheduler) == {"a": 36, "b": 16}  # b finds the 4 pages of a's first chunk
    assert b.num_cached_tokens == 64 and b.pages[:4] == a.pages[:4] and b.pages[4] != a.pages[4]
    assert (scheduler.prefix_cache_queries, scheduler.prefix_cache_hits) == (180, 64)


def test_requests_of_one_step_share_what_the_first_of_them_computes() -> None:
    requests = [make_request(name, list(range(40))) for name in "abc"]
    scheduler = make_scheduler(*requests, token_budget=128)
    assert step(scheduler) == {"a": 40, "b": 8, "c": 8}
    assert all(r.pages[:2] == requests[0].pages[:2] and r.num_computed_tokens == 40 for r in requests)
    assert len({r.pages[2] for r in requests}) == 3  # each writes its own


def test_a_preempted_request_comes_back_from_the_cache() -> None:
    a, b = make_request("a", 10), make_request("b", 40)
    scheduler = make_scheduler(a, b, kv_cache_tokens=128)
    step(scheduler)
    scheduler._preempt_latest()
    assert step(scheduler) == {"a": 1, "b": 41 - 32}
    assert b.num_cached_tokens == 0 and scheduler.prefix_cache_hits == 0  # not a hit of its prompt


def test_prefix_caching_can_be_off() -> None:
    a, b = make_request("a", list(range(40))), make_request("b", list(range(40)))
    scheduler = make_scheduler(a, enable_prefix_caching=False)
    step(scheduler)
    scheduler.add(b)
    assert step(scheduler) == {"a": 1, "b": 40}
    assert scheduler.cache.num_cached_pages == 0 and scheduler.prefix_cache_queries == 0


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_prefix_groups_of_a_step(batch_invariant: bool) -> None:
    """Five requests share 1024 tokens: 4 x 1024 keys saved. Batch-invariant plans must not depend on it."""
    prompt = [i % 251 for i in range(1024)]
    requests = [make_request(str(i), [*prompt, i]) for i in range(5)]
    limits = {"kv_cache_tokens": 4096, "max_model_len": 2048, "token_budget": 2048}
    scheduler = make_scheduler(requests[0], batch_invariant=batch_invariant, **limits)
    step(scheduler)
    for request in requests[1:]:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan.prefix_groups == ([] if batch_invariant else [(1024, [0, 1, 2, 3, 4])])


def test_no_torch_here() -> None:
    folder = Path(tilestream.engine.scheduler.__file__).parent
    numeric = {"batch.py", "logits.py", "runner.py", "sampling_shards.py", "profiler.py"}  # profiler.py: numpy alone, at start-up
    for path in folder.glob("*.py"):
        if path.name in numeric:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            allowed = ("tilestream.engine", "tilestream.sampling_params", "tilestream.constraint")
            assert all(not n.startswith(("torch", "numpy")) for n in names), path
            assert all(n.startswith(allowed) for n in names if n.startswith("tilestream")), path
