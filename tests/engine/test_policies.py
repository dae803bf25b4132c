"""Who goes first: the pure functions, the queue against a sorted list, and fairness among tenants over time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilestream.engine.policies import LPM_MAX_PASSED, LPM_WINDOW, ServiceAccount, longest_prefix, next_tenant, rank
from tilestream.engine.request import Request, RequestOptions, RequestState
from tilestream.engine.scheduler import Scheduler
from tilestream.engine.waiting_queue import WaitingQueue

from .fakes import make_config
from .test_scheduler import finish_step, make_request, step


def waiting_request(index: int, *, tenant: str = "", priority: int = 0, tokens: int = 8) -> Request:
    request = make_request(f"{tenant}{index}", tokens)
    request.arrival_index = index
    request.options = RequestOptions(tenant=tenant, priority=priority)
    return request


def test_rank() -> None:
    early, late = waiting_request(1, priority=5), waiting_request(2, priority=-5)
    assert rank("priority", late) < rank("priority", early)
    assert rank("fcfs", early) < rank("fcfs", late) and rank("lpm", early) < rank("lpm", late)


@pytest.mark.parametrize(
    ("policy", "turn"),
    [("fcfs", "b"), ("lpm", "b"), ("priority", "c")],  # b was served least; c is more important
)
def test_next_tenant(policy: str, turn: str) -> None:
    heads = {t: waiting_request(i, tenant=t, priority=-(t == "c")) for i, t in enumerate("abc")}
    assert next_tenant(policy, heads, {"a": 10, "b": 5, "c": 20}) == turn
    assert next_tenant("fcfs", heads, {"a": 5, "b": 5, "c": 20}) == "a"  # who came first
    assert next_tenant(policy, {"a": heads["a"]}, {"a": 1}) == "a"


def test_longest_prefix_takes_the_first_of_equals() -> None:
    requests = [waiting_request(i) for i in range(4)]
    assert longest_prefix(requests, lambda request: [0, 32, 64, 64][request.arrival_index]) == 2
    assert longest_prefix(requests, lambda request: 0) == 0


@given(
    policy=st.sampled_from(("fcfs", "priority")),
    arrivals=st.lists(st.tuples(st.sampled_from("ab"), st.integers(-2, 2), st.integers(1, 50)), max_size=30),
    leaves=st.lists(st.integers(0, 99), max_size=30),
)
def test_the_queue_is_a_sorted_list_per_tenant(policy: str, arrivals: list, leaves: list[int]) -> None:
    queue = WaitingQueue(policy, lambda request: 0)
    expected: list[Request] = []
    for index, (tenant, priority, tokens) in enumerate(arrivals):
        expected.append(waiting_request(index, tenant=tenant, priority=priority, tokens=tokens))
        queue.add(expected[-1])
    for leave in leaves:
        if expected:
            queue.remove(expected.pop(leave % len(expected)))
    assert sorted(r.request_id for r in queue) == sorted(r.request_id for r in expected)
    assert (len(queue), queue.num_tokens) == (len(expected), sum(r.num_tokens for r in expected))
    by_tenant = {t: [r for r in expected if r.options.tenant == t] for t in "ab"}
    while expected:
        first = queue.first()
        assert first is min(by_tenant[first.options.tenant], key=lambda r: rank(policy, r))
        if policy == "priority":
            assert first.options.priority == min(r.options.priority for r in expected)
        queue.remove(first)
        expected.remove(first)
        by_tenant[first.options.tenant].remove(first)
    assert not queue and queue.num_tokens == 0


def test_lpm_passes_nobody_for_ever() -> None:
    """The first has nothing in the cache, and others that do keep coming; some of them leave unanswered."""
    queue = WaitingQueue("lpm", lambda request: request.arrival_index)
    queue.add(waiting_request(0))
    num_admitted = 0
    for index in range(1, 3 * LPM_MAX_PASSED):
        queue.add(waiting_request(index))
        first = queue.first()
        if first.arrival_index == 0:
            break
        assert first.arrival_index == index
        if index % 2:
            queue.admit(first)
            num_admitted += 1
        else:
            queue.remove(first)
    assert num_admitted == LPM_MAX_PASSED


def test_lpm_looks_at_the_front_of_the_queue_alone() -> None:
    asked: list[int] = []
    queue = WaitingQueue("lpm", lambda request: asked.append(request.arrival_index) or 0)
    for index in range(1000):
        queue.add(waiting_request(index))
    assert queue.first().arrival_index == 0 and asked == list(range(LPM_WINDOW))


def test_lpm_admits_who_shares_what_is_cached() -> None:
    shared = list(range(64))
    scheduler = Scheduler(make_config(policy="lpm", max_num_seqs=1))
    scheduler.add(make_request("a", [*shared, 1]))
    assert step(scheduler) == {"a": 64}
    for request in (make_request("stranger", 40), make_request("b", [*shared, 2])):
        scheduler.add(request)
    scheduler.finish(scheduler.running[0])
    assert step(scheduler) == {"b": 1}


def test_priority_admits_the_important_and_preempts_the_unimportant() -> None:
    scheduler = Scheduler(make_config(policy="priority", kv_cache_tokens=96, enable_prefix_caching=False))
    requests = {name: make_request(name, 16) for name in "abc"}
    for priority, (name, request) in zip((2, 0, 1), requests.items()):
        request.options = RequestOptions(priority=priority)
        scheduler.add(request)
    assert list(step(scheduler)) == ["b", "c", "a"]
    for _ in range(16):
        step(scheduler)
    assert list(step(scheduler)) == ["b", "c"]  # a came first, and matters least
    assert requests["a"].state is RequestState.WAITING


def test_an_account_that_comes_back_has_no_claim_on_the_past() -> None:
    account = ServiceAccount()
    account.join("a", [])
    account.charge("a", 1000)
    account.join("b", ["a"])  # new
    assert account.served_tokens["b"] == 1000
    account.leave("b")
    account.charge("a", 500)
    account.join("b", ["a"])
    assert account.served_tokens["b"] == 1500
    account.charge("b", 100)
    account.leave("b")
    account.leave("a")
    account.join("c", [])  # nobody waits: as the one who left last
    assert account.served_tokens == {"a": 1500, "b": 1600, "c": 1500}
    account.join("b", ["c"])
    assert account.served_tokens["b"] == 1600  # and a debt stays


def serve_for_ever(scheduler: Scheduler, tenants: dict[str, tuple[int, int]], num_steps: int, seed: int) -> list[dict[str, int]]:
    """Keep requests of every tenant waiting; the tokens that each was given by every step's end, what was computed twice
    counted once. tenants: longest (prompt, answer)."""
    rng = random.Random(seed)
    history = []
    served = dict.fromkeys(tenants, 0)
    computed: dict[str, int] = {}  # by request
    num_requests = 0
    for _ in range(num_steps):
        for tenant, (most_prompt, most_output) in tenants.items():
            while sum(r.options.tenant == tenant for r in scheduler.waiting) < 12:
                request = make_request(f"{tenant}{num_requests}", rng.randint(1, most_prompt))
                request.options = RequestOptions(tenant=tenant)
                request.max_num_tokens = request.num_prompt_tokens + rng.randint(1, most_output)
                scheduler.add(request)
                num_requests += 1
        plan = scheduler.schedule()
        finish_step(scheduler, plan)
        for item in plan.scheduled:
            request, before = item.request, computed.get(item.request.request_id, 0)
            computed[request.request_id] = max(before, item.start + item.num_new_tokens)
            served[request.options.tenant] += computed[request.request_id] - before
            if request.num_tokens >= request.max_num_tokens:
                scheduler.finish(request)
        history.append(dict(served))
    assert served == scheduler.waiting.service.served_tokens
    return history


@pytest.mark.parametrize("kv_cache_tokens", [192, 1024])  # 192: with preemptions
@pytest.mark.parametrize("seed", range(3))
def test_tenants_that_wait_are_served_alike(seed: int, kv_cache_tokens: int) -> None:
    """VTC's theorem: the service of two tenants that always wait differs by no more than twice what a batch holds. Tenants
    of very different requests come close to that; without accounts, the difference would grow for ever."""
    scheduler = Scheduler(make_config(kv_cache_tokens=kv_cache_tokens, max_num_seqs=8, enable_prefix_caching=False))
    tenants = {"long": (120, 60), "short": (10, 5), "middle": (40, 20)}
    history = serve_for_ever(scheduler, tenants, 1500, seed)
    bound = 2 * kv_cache_tokens
    assert all(max(served.values()) - min(served.values()) <= bound for served in history)
    assert min(history[-1].values()) > 10 * bound or kv_cache_tokens > 192
    assert (scheduler.num_preemptions > 0) == (kv_cache_tokens == 192)


def test_a_tenant_with_few_requests_does_not_wait_behind_one_with_many() -> None:
    scheduler = Scheduler(make_config(max_num_seqs=4, token_budget=64))
    for index in range(100):
        request = make_request(f"flood{index}", 50)
        request.options = RequestOptions(tenant="flood")
        scheduler.add(request)
    for _ in range(8):
        step(scheduler)
    late = make_request("late", 10)
    late.options = RequestOptions(tenant="late")
    scheduler.add(late)
    scheduler.finish(scheduler.running[0])
    step(scheduler)
    scheduler.finish(scheduler.running[0])
    step(scheduler)
    assert late.state is RequestState.RUNNING and len(scheduler.waiting) > 90


def test_what_is_computed_again_is_not_charged_again() -> None:
    a, b = make_request("a", 10), make_request("b", 40)
    scheduler = Scheduler(make_config(enable_prefix_caching=False))
    for request in (a, b):
        scheduler.add(request)
    step(scheduler)
    served = scheduler.waiting.service.served_tokens
    assert served == {"": 50}
    scheduler._preempt_latest()
    assert step(scheduler) == {"a": 1, "b": 41}
    assert served == {"": 52}  # a's token, and the one of b's 41 that was new
