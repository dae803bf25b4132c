"""A step cut in two computes what the whole one does, wherever the cut falls."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilestream.engine.engine import Engine
from tilestream.engine.step_plan import SampledTokens, StepPlan
from tilestream.engine.step_split import split_step

from tests.engine.fakes import COSTS, GREEDY, ByteTokenizer, FakeRunner, expected_output, make_config, run_all, tokens_of
from tests.engine.test_scheduler import make_request

ITEMS = st.lists(
    st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(1, 80)), st.booleans()), min_size=1, max_size=12
)


def plan_of(items: list[tuple[int, int, bool]]) -> StepPlan:
    """(tokens before the step, tokens of it, whether it reaches the newest token) of each request."""
    plan = StepPlan()
    for start, num_new_tokens, samples in items:
        request = make_request("r", start + num_new_tokens + (not samples))
        request.num_computed_tokens = start
        plan.add(request, num_new_tokens)
    return plan


def tokens(plan: StepPlan) -> list[tuple[int, int]]:
    """(request, position) of each of a step's tokens."""
    return [(id(i.request), position) for i in plan.scheduled for position in range(i.start, i.start + i.num_new_tokens)]


@given(items=ITEMS, data=st.data())
def test_the_halves_are_the_step(items: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    plan = plan_of(items)
    if plan.num_tokens == 1:
        items.append((5, 3, True))
        plan = plan_of(items)
    num_first = data.draw(st.integers(1, plan.num_tokens - 1))
    first, second = split_step(plan, num_first)
    assert first.num_tokens == num_first and second.num_tokens == plan.num_tokens - num_first
    assert tokens(first) + tokens(second) == tokens(plan)
    drawn = [item.request for half in (first, second) for item in half.scheduled if item.samples]
    assert drawn == [item.request for item in plan.scheduled if item.samples]
    assert first.num_samples + second.num_samples == plan.num_samples
    for half in (first, second):
        for item in half.scheduled:  # who samples has its newest token there
            assert not item.samples or item.start + item.num_new_tokens == len(item.request.token_ids)
    # A part of one token counts as a decode, so only the sum is kept.
    pairs = [half.num_prefill_pairs + half.num_decode_keys for half in (first, second, plan)]
    assert pairs[0] + pairs[1] == pairs[2]


def test_groups_go_where_their_members_are() -> None:
    plan = plan_of([(100, 1, True), (100, 1, True), (64, 1, True), (64, 10, True), (64, 10, True), (0, 20, True)])
    plan.prefix_groups = [(96, [0, 1]), (64, [2, 3, 4])]
    first, second = split_step(plan, 8)  # through request 3
    assert [item.num_new_tokens for item in first.scheduled] == [1, 1, 1, 5]
    assert first.prefix_groups == [(96, [0, 1]), (64, [2, 3])]
    assert [item.num_new_tokens for item in second.scheduled] == [5, 10, 20]
    assert second.prefix_groups == [(64, [0, 1])]
    first, second = split_step(plan, 1)
    assert first.prefix_groups == [] and second.prefix_groups == [(64, [1, 2, 3])]


@pytest.mark.parametrize("num_first", [0, 9, -1])
def test_no_half_is_empty(num_first: int) -> None:
    with pytest.raises(ValueError, match=rf"num_first is {num_first}; a step of 9 tokens is cut at 1\.\.8"):
        split_step(plan_of([(0, 9, True)]), num_first)


class SplittingRunner(FakeRunner):
    """Runs every step as two, cut anywhere."""

    rng = random.Random(3)
    others: set[int] = set()  # requests of the second half, while the first one runs

    def launch(self, plan: StepPlan) -> SampledTokens:
        if plan.num_tokens == 1:
            return super().launch(plan)
        super()._check(plan)
        drawn_before, drawn = self.drawn, []
        halves = split_step(plan, self.rng.randrange(1, plan.num_tokens))
        for half, others in zip(halves, (halves[1].scheduled, []), strict=True):
            self.drawn, self.others = drawn_before, {id(item.request) for item in others}
            drawn += super().launch(half).token_ids
        self.drawn = drawn
        return SampledTokens(drawn)

    def _write(self, pages: list[int], position: int, state: int, later: set[int]) -> None:
        super()._write(pages, position, state, later | self.others)

    def _check(self, plan: StepPlan) -> None:
        pass  # of a half


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_answers_are_the_same(overlaps: bool) -> None:
    config = make_config(token_budget=50)
    runner = SplittingRunner(config, overlaps=overlaps)
    engine = runner.engine = Engine(runner, ByteTokenizer(), config, COSTS)
    rng = random.Random(5)
    requests = {str(i): [rng.randrange(97, 123) for _ in range(rng.randrange(1, 120))] for i in range(12)}
    requests["twin"] = requests["3"] + [65]
    for name, prompt in requests.items():
        engine.add_request(name, prompt, GREEDY)
    answers = run_all(engine)
    for name, prompt in requests.items():
        assert tokens_of(answers[name]) == expected_output(prompt, GREEDY, 0, 8)
