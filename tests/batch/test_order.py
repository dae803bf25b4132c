"""The order: groups by the share of their decodes; and as many requests at a time as the cache is expected to
hold."""

from __future__ import annotations

import random

import pytest
from tilestream.batch.lines import Line
from tilestream.batch.order import KvMemory, Work, WorkGroup, in_file_order, in_shared_order


def work(name: str, prompt: list[int], max_tokens: int | None = 10, *, n: int = 1, salt: str = "") -> Work:
    return Work.of(Line(1, name, name), [prompt] * n, [max_tokens] * n, salt)


def names(groups: list[WorkGroup]) -> list[list[str]]:
    return [[work.line.id for work in group.works] for group in groups]


def test_long_answers_for_short_prompts_come_first() -> None:
    a, b = [[1] * 33 + [i] for i in range(2)], [[2] * 65 + [i] for i in range(2)]
    works = [
        work("b0", b[0], 10), work("a0", a[0], 5), work("alone", [3] * 10, 40), work("b1", b[1], 20), work("a1", a[1], 50),
    ]  # fmt: skip
    groups = in_shared_order(works, 16)
    assert names(groups) == [["alone"], ["a1", "a0"], ["b1", "b0"]]
    assert [group.prefix_tokens for group in groups] == [0, 32, 64]
    assert [round(group.decode_share, 2) for group in groups] == [4.0, round(55 / 36, 2), round(30 / 68, 2)]
    assert names(in_file_order(works)) == [["b0"], ["a0"], ["alone"], ["b1"], ["a1"]]


def test_salts_are_groups_apart() -> None:
    prompt = [1] * 33
    groups = in_shared_order([work("a", prompt, salt="x"), work("b", prompt), work("c", prompt, salt="x")], 16)
    assert sorted(names(groups)) == [["a", "c"], ["b"]]


def test_choices_share_their_prompt() -> None:
    """What is their own is counted for each choice; the prefix is counted once for all."""
    prompt = [1] * 33
    group = in_shared_order([work("a", prompt, 10, n=3), work("b", prompt, None)], 16)[0]
    assert group.prefix_tokens == 32
    assert [group.own_tokens(w) for w in group.works] == [1, 3]  # b's answer is taken to be the longer one
    assert group.decode_share == (256 + 30) / (32 + 1 + 3)


def test_as_many_run_as_fit() -> None:
    works = [work(str(i), [7] * 160 + [i], 40) for i in range(9)]
    (group,) = in_shared_order(works, 16)
    memory = KvMemory(160 + 4 * 57, 16)  # the prefix, and for each one token of its own, 40 of its answer, a page to spare
    for i, one in enumerate(group.works[:5]):
        assert memory.fits(group, one) == (i < 4)
        if i < 4:
            memory.take(group, one)
    memory.give_back(group, works[0], 40)
    assert memory.fits(group, works[4])


def test_what_fits_nowhere_runs_alone() -> None:
    memory = KvMemory(64, 16)
    big, small = (in_file_order([work(name, [1] * n)])[0] for name, n in (("big", 500), ("small", 5)))
    assert memory.fits(big, big.works[0])
    memory.take(big, big.works[0])
    assert not memory.fits(small, small.works[0])
    memory.give_back(big, big.works[0], 0)
    assert memory.fits(small, small.works[0])


def test_short_answers_let_more_run() -> None:
    memory = KvMemory(1000, 16)
    works = [work(str(i), [i] * 10, 474) for i in range(9)]
    groups = in_file_order(works)
    for group in groups[:2]:
        memory.take(group, group.works[0])
    assert not memory.fits(groups[2], works[2])
    for group in groups[:2]:
        memory.give_back(group, group.works[0], 0)
    for group in groups[2:5]:  # those needed 500 tokens, these 10 + 474 * 1000 / 1948 + 16
        assert memory.fits(group, group.works[0])
        memory.take(group, group.works[0])
    assert not memory.fits(groups[5], works[5])


@pytest.mark.parametrize("seed", range(20))
def test_memory_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    works = [work(str(i), [rng.randrange(2)] * rng.randint(1, 60), rng.randint(1, 90), n=rng.randint(1, 3)) for i in range(60)]
    memory = KvMemory(500, 16)
    queue = [(group, work) for group in in_shared_order(works, 16) for work in group.works]
    running = []
    while queue or running:
        while queue and memory.fits(*queue[0]):
            running.append(queue.pop(0))
            memory.take(*running[-1])
        assert running and (len(running) == 1 or memory._taken_tokens <= 500)
        memory.give_back(*running.pop(rng.randrange(len(running))), rng.randint(0, 90))
    assert memory._taken_tokens == 0 and not memory._begun
