"""Groups are of equal pages, disjoint, and save what they say; the same while nothing changes."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from tilestream.engine import prefix_groups
from tilestream.engine.prefix_groups import PrefixGrouper, SharingCost, find_prefix_groups

COST = SharingCost(tile_tokens=32, merge_tokens=512)
SHARED = list(range(64))
LISTS = [[*SHARED, 100 + i] for i in range(5)]
ONE = [1] * 9


def test_a_group_must_pay() -> None:
    assert find_prefix_groups(LISTS, [64] * 5, ONE, 32, COST) == [(2048, [0, 1, 2, 3, 4])]
    assert find_prefix_groups(LISTS[:2], [64] * 2, ONE, 32, COST) == [(2048, [0, 1])]  # reads 2048 less, for 2 x 512
    assert find_prefix_groups(LISTS[:2], [31] * 2, ONE, 32, COST) == []
    assert find_prefix_groups(LISTS[:1], [64], ONE, 32, COST) == []
    assert find_prefix_groups([[7, *s] for s in LISTS], [65] * 5, ONE, 16, COST) == [(1040, [0, 1, 2, 3, 4])]


def test_pages_that_some_have_not_computed_do_not_count() -> None:
    assert find_prefix_groups(LISTS, [30, 40, 64, 64, 64], ONE, 32, COST) == [(2048, [2, 3, 4])]
    assert find_prefix_groups(LISTS[:3], [60, 62, 64], ONE, 32, COST) == [(1920, [0, 1, 2])]


def test_prefills_that_fill_their_tiles_stay_out() -> None:
    assert find_prefix_groups(LISTS, [64] * 5, [1, 64, 1, 33, 2], 32, COST) == [(2048, [0, 2, 4])]
    assert find_prefix_groups(LISTS, [64] * 5, [64] * 5, 32, COST) == []


def test_splits_where_that_saves_more() -> None:
    """All share page 0; two sets of four share 64 pages each, and two more requests 40 of their own."""
    lists = [[0, *range(100, 163)]] * 4 + [[9, 9]] + [[0, *range(200, 263)]] * 4
    computed = [64, 64, 64, 64, 2, 64, 64, 64, 64]
    assert find_prefix_groups(lists, computed, ONE, 32, COST) == [(2048, [0, 1, 2, 3]), (2048, [5, 6, 7, 8])]
    lists = [[*range(64), 1000 + i // 4] for i in range(8)]  # here the whole saves more
    assert find_prefix_groups(lists, [65] * 8, ONE, 32, COST) == [(2048, list(range(8)))]


def test_those_that_a_part_leaves_over_may_be_a_group_too() -> None:
    deep = [*range(200)]
    lists = [deep, deep, [*deep[:64], 500], [*deep[:64], 600]]
    assert find_prefix_groups(lists, [200, 200, 65, 65], ONE, 32, COST) == [(6400, [0, 1]), (2048, [2, 3])]


def test_each_a_turn_longer_than_the_one_before() -> None:
    """A conversation's turns, all at once: few levels for many requests, and nearly the saving of all of them."""
    lists = [[*range(i + 1), 100_000 + i] for i in range(1200)]
    groups = find_prefix_groups(lists, list(map(len, lists)), [1] * 1200, 32, COST)
    members = [i for _, group in groups for i in group]
    assert len(members) == len(set(members))
    assert all(lists[min(group)][: tokens // 32] == list(range(tokens // 32)) for tokens, group in groups)
    assert saved(groups, [1] * 1200, COST) > 0.8 * sum(32 * (i + 1) for i in range(1200))


def saved(groups: list[tuple[int, list[int]]], num_new_tokens: list[int], cost: SharingCost) -> float:
    """Tokens read for a tile that need not be, less the merges; counted tile by tile."""
    total = 0.0
    for prefix_tokens, members in groups:
        q = [num_new_tokens[i] for i in members]
        alone = sum(-(-n // cost.tile_tokens) for n in q)
        total += prefix_tokens * (alone - -(-sum(q) // cost.tile_tokens)) - cost.merge_tokens * sum(q)
    return total


@pytest.mark.parametrize("seed", range(100))
def test_any_step(seed: int) -> None:
    rng = random.Random(seed)
    cost = SharingCost(rng.choice((4, 32)), rng.choice((1, 8, 100)))
    tree = [[rng.randrange(3) for _ in range(6)] for _ in range(4)]
    pages: dict[tuple[int, ...], int] = {}
    lists, computed, new = [], [], []
    for i in range(rng.randint(1, 12)):
        path = rng.choice(tree)[: rng.randint(0, 6)]
        chain = [pages.setdefault(tuple(path[: d + 1]), len(pages)) for d in range(len(path))]
        computed.append(len(chain))
        lists.append([*chain, 10_000 + i])
        new.append(rng.choice((1, 1, 1, 3, 4, 40)))
    groups = find_prefix_groups(lists, computed, new, 16, cost)
    members = [i for _, group in groups for i in group]
    assert len(members) == len(set(members)) and groups == sorted(groups, key=lambda group: group[1][0])
    for tokens, group in groups:
        assert tokens % 16 == 0 and group == sorted(group) and len(group) > 1
        assert all(computed[i] * 16 >= tokens and lists[i][: tokens // 16] == lists[group[0]][: tokens // 16] for i in group)
        assert saved([(tokens, group)], new, cost) > 0
    for i, j in combinations(range(len(lists)), 2):  # no pair alone would have been the better choice
        common = next((d for d in range(min(computed[i], computed[j])) if lists[i][d] != lists[j][d]),
                      min(computed[i], computed[j]))
        assert saved([(common * 16, [i, j])], new, cost) <= saved(groups, new, cost) + 1e-6


def test_costs_of_devices() -> None:
    cpu = SharingCost.of("cpu", 9, 3, 64, 2)
    assert (cpu.tile_tokens, cpu.merge_tokens) == (32, 384)
    gpu, gpu_8bit = (SharingCost.of("cuda", 32, 8, 128, kv_bytes) for kv_bytes in (2, 1))
    assert gpu.merge_tokens < 20 < gpu_8bit.merge_tokens < cpu.merge_tokens  # a merge is dearer where K and V are small


def test_nothing_is_compared_while_the_same_requests_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    grouper = PrefixGrouper(32, COST)
    lists = [list(pages) for pages in LISTS]
    expected = grouper.find(list(lists), [1] * 5, [64 * 32] * 5)
    assert expected == [(2048, [0, 1, 2, 3, 4])]
    compare = prefix_groups.find_prefix_groups
    monkeypatch.setattr(prefix_groups, "find_prefix_groups", None)
    for pages in lists:
        pages.append(200 + pages[-1])
    assert grouper.find(list(lists), [1] * 5, [66 * 32] * 5) == expected
    monkeypatch.setattr(prefix_groups, "find_prefix_groups", compare)
    assert grouper.find(lists[1:], [1] * 4, [66 * 32] * 4) == [(2048, [0, 1, 2, 3])]  # one has left
    lists[1] = [7, *lists[1][1:]]  # came back from a preemption, with other pages
    assert grouper.find(lists[1:], [1] * 4, [66 * 32] * 4) == [(2048, [1, 2, 3])]
    assert grouper.find(lists[1:], [1, 1, 64, 64], [66 * 32] * 4) == []
