"""The tree holds every prompt once, and its groups save as much as any grouping can."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from tilestream.batch.prefix_tree import Group, Node, best_groups, build_tree

PAGE_SIZE = 2


def arrays(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(prompt, np.int32) for prompt in prompts]


def groups_of(prompts: Sequence[Sequence[int]], page_size: int = PAGE_SIZE) -> list[Group]:
    return best_groups(build_tree(arrays(prompts), page_size))


def saved_pages(groups: Sequence[Group]) -> int:
    """Pages that need not be computed because groups share them."""
    return sum(group.num_pages * (len(group.prompts) - 1) for group in groups)


def num_common_pages(prompts: Sequence[Sequence[int]]) -> int:
    """Whole pages that all begin with, the last token of each left out."""
    shortest = min(len(prompt) - 1 for prompt in prompts)
    num = 0
    while (num + 1) * PAGE_SIZE <= shortest and len({tuple(p[: (num + 1) * PAGE_SIZE]) for p in prompts}) == 1:
        num += 1
    return num


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def random_prompts(rng: random.Random, num: int) -> list[list[int]]:
    trunk = [rng.randrange(2) for _ in range(20)]
    return [trunk[: rng.randrange(16)] + [rng.randrange(2) for _ in range(rng.randint(1, 8))] for _ in range(num)]


@pytest.mark.parametrize("seed", range(150))
def test_as_good_as_the_best_of_all_partitions(seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, rng.randint(1, 7))
    groups = groups_of(prompts)
    best = max(
        sum(num_common_pages([prompts[i] for i in part]) * (len(part) - 1) for part in parts)
        for parts in partitions(list(range(len(prompts))))
    )
    assert saved_pages(groups) == best


@pytest.mark.parametrize("seed", range(30))
def test_every_prompt_is_in_one_group_of_equal_beginnings(seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, 200)
    groups = groups_of(prompts)
    assert sorted(i for group in groups for i in group.prompts) == list(range(200))
    for group in groups:
        assert num_common_pages([prompts[i] for i in group.prompts]) >= group.num_pages


@pytest.mark.parametrize("seed", range(30))
def test_the_tree_is_compact_and_holds_every_prompt(seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, 100)
    seen: list[int] = []

    def walk(node: Node, beginning: list[int]) -> None:
        seen.extend(node.prompts)
        inner = node.num_pages > 0
        assert len(node.children) != 1 or node.prompts or not inner, "a node that nothing ends at and nothing parts at"
        for index in node.prompts:
            assert (len(prompts[index]) - 1) // PAGE_SIZE == node.num_pages
            assert prompts[index][: len(beginning)] == beginning
        firsts = []
        for child in node.children:
            assert child.num_pages > node.num_pages
            one = child
            while not one.prompts:
                one = one.children[0]
            beginning = prompts[one.prompts[0]][: child.num_pages * PAGE_SIZE]
            firsts.append(tuple(beginning[: (node.num_pages + 1) * PAGE_SIZE]))
            walk(child, beginning)
        assert len(firsts) == len(set(firsts)), "children that share a page"

    walk(build_tree(arrays(prompts), PAGE_SIZE), [])
    assert sorted(seen) == list(range(100))


def test_a_deep_node_becomes_a_group_when_enough_share_it() -> None:
    """BatchLLM's example of enlargement: (leaves - 1) * own pages against the pages that are computed
    twice."""
    head, own = [1] * 4, [2] * 8
    some = [[*head, 9, i] for i in range(3)]
    few, many = ([[*head, *own, 8, i] for i in range(num)] for num in (1, 3))
    assert [g.num_pages for g in groups_of([*some, *few])] == [2]
    assert sorted((g.num_pages, len(g.prompts)) for g in groups_of([*some, *many])) == [(2, 3), (6, 3)]


def test_prompts_that_share_nothing_and_chains() -> None:
    assert groups_of([]) == []
    assert groups_of([[1]]) == [Group(0, (0,))]
    assert {group.num_pages for group in groups_of([[1, 2, 3], [4, 5, 6], [7]])} == {0}
    assert groups_of([[1, 2, 3]] * 3) == [Group(1, (0, 1, 2))]
    chain = [[5] * n for n in range(1, 3000)]  # every prompt goes on where another ends: the tree is one path
    groups = groups_of(chain, 16)
    assert sorted(i for group in groups for i in group.prompts) == list(range(2999))
    assert saved_pages(groups) > 0.5 * sum(len(prompt) // 16 for prompt in chain)
