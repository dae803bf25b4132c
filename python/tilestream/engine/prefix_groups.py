"""Which requests of a step hold the same leading pages, and where it pays that one job attends to these for all.

A *group* attends to its prefix with one q tile for many requests, so the prefix's keys and values are read
once per tile and not once per request. It costs one more partial result for each of its tokens, and a merge.
`SharingCost` weighs the two; pages are compared by id and by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, count, pairwise
from operator import is_, ne

PrefixGroup = tuple[int, list[int]]  # (prefix_tokens, indices of the members in the step)

# Of the CPU kernel: a token's merge costs as much as this many tokens read for each of its output values. Measured
# by bench/bench_prefix.py on an AMD EPYC with AVX-512, one thread: prefixes pay from about 280 tokens on with 3 heads
# of 64 for a kv head, from one to two thousand with 4 heads of 128. The kernel is bound by arithmetic, so what a
# group saves is small: 4 to 24% of a decode's attention; 1.5 to 2.9 times only where prefixes outgrow L2.
_CPU_MERGE_TOKENS_PER_VALUE = 2.0
# By formula, not measured: on a GPU both sides count by their bytes. A group makes two partial results of a
# final one, and each is written and read in float32, with its log-sum-exp.
_CUDA_PARTIAL_PASSES = 4
# Prefixes that differ by less than this part of the shortest count as one: so many requests that are each a turn longer than
# the one before are few levels deep, and take milliseconds where every level would take a tenth of a second.
_LEVEL = 8
_TILE_ROWS = {"cpu": 96, "cuda": 64}  # as ops/plan.py cuts; on CUDA the smallest of its kernels'


@dataclass(frozen=True, slots=True)
class SharingCost:
    """What a group saves and costs on a device, in tokens whose keys and values are read for one q tile.

    Args:
        tile_tokens: q tokens of a tile.
        merge_tokens: what one token's membership costs.
    """

    tile_tokens: int = 32
    merge_tokens: float = 512.0

    @staticmethod
    def of(device_type: str, num_qo_heads: int, num_kv_heads: int, head_dim: int, kv_bytes: float) -> SharingCost:
        """The cost on "cpu" or "cuda" for a model's heads, and the bytes of an element of its KV cache."""
        group_size = num_qo_heads // num_kv_heads
        merge_tokens = _CPU_MERGE_TOKENS_PER_VALUE * group_size * head_dim
        if device_type == "cuda":
            merge_tokens = _CUDA_PARTIAL_PASSES * group_size * (head_dim + 1) * 4 / (2 * head_dim * kv_bytes)
        return SharingCost(max(1, _TILE_ROWS[device_type] // group_size), merge_tokens)

    def num_tiles(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tile_tokens)


class PrefixGrouper:
    """Finds the groups of each step. While the same requests decode, they are those of the step before.

    Args:
        page_size: tokens per page.
        cost: when a group pays.
    """

    def __init__(self, page_size: int, cost: SharingCost) -> None:
        self.page_size = page_size
        self.cost = cost
        self._page_lists: list[list[int]] = []
        self._num_new_tokens: list[int] = []
        self._groups: list[PrefixGroup] = []

    def find(
        self, page_lists: list[list[int]], num_new_tokens: list[int], num_computed_tokens: Sequence[int]
    ) -> list[PrefixGroup]:
        """The groups of a step.

        Args:
            page_lists: page ids of each request of the step, in sequence order. A list that was given before
                may have grown since, by pages that no other request holds; pages are shared from a list's
                beginning on or never.
            num_new_tokens: of each request in this step.
            num_computed_tokens: of each request before this step.
        Returns:
            Groups that pay, in order of their first member; a request is in at most one.
        """
        if num_new_tokens != self._num_new_tokens or not all(map(is_, page_lists, self._page_lists)):
            self._page_lists, self._num_new_tokens = page_lists, num_new_tokens
            num_pages = [tokens // self.page_size for tokens in num_computed_tokens]
            self._groups = find_prefix_groups(page_lists, num_pages, num_new_tokens, self.page_size, self.cost)
        return self._groups


def find_prefix_groups(
    page_lists: Sequence[Sequence[int]],
    num_prefix_pages: Sequence[int],
    num_new_tokens: Sequence[int],
    page_size: int,
    cost: SharingCost,
) -> list[PrefixGroup]:
    """Group requests by shared leading pages. Where a set of requests shares a short prefix and subsets of it
    share longer ones, the choice that saves more is taken.

    Args:
        page_lists: page ids of each request of the step, in sequence order.
        num_prefix_pages: how many of them, from the front, end before its own tokens of this step; they are written before
            anybody attends, perhaps in this step by another request.
        num_new_tokens: q tokens of each request.
        page_size: tokens per page.
        cost: when a group pays.
    Returns:
        Groups in order of their first member. Linear in the pages of requests whose first page is shared, but
        for a sort of those requests.
    """
    by_first_page: dict[int, list[int]] = {}
    for index, num_pages in enumerate(num_prefix_pages):
        if num_pages > 0:
            by_first_page.setdefault(page_lists[index][0], []).append(index)
    groups: list[PrefixGroup] = []
    for members in by_first_page.values():
        if len(members) > 1:
            prefixes = [page_lists[index][: num_prefix_pages[index]] for index in members]
            order = sorted(range(len(members)), key=prefixes.__getitem__)  # what shares the most stands together
            common = [_num_common(prefixes[a], prefixes[b]) for a, b in pairwise(order)]
            order = [members[i] for i in order]
            groups += _best_groups(order, common, num_new_tokens, page_size, cost)[1]
    return sorted(groups, key=lambda group: group[1][0])


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))


def _best_groups(
    order: list[int], common: list[int], num_new_tokens: Sequence[int], page_size: int, cost: SharingCost
) -> tuple[float, list[PrefixGroup]]:
    """The choice among one group of all of `order` and the best groups of its parts, and what it saves.

    Args:
        order: requests, sorted by their pages.
        common: how many leading pages each has in common with the next.
    """
    if len(order) < 2:
        return 0.0, []
    shortest = min(common)
    tokens, level = shortest * page_size, shortest + shortest // _LEVEL
    whole = _group(tokens, order, num_new_tokens, cost)
    if max(common) <= level:
        return whole
    gain, groups = 0.0, []
    begin = 0
    for end in [*(i + 1 for i, pages in enumerate(common) if pages <= level), len(order)]:
        part = _best_groups(order[begin:end], common[begin : end - 1], num_new_tokens, page_size, cost)
        gain, groups = gain + part[0], groups + part[1]
        begin = end
    taken = {index for _, members in groups for index in members}
    rest = _group(tokens, [index for index in order if index not in taken], num_new_tokens, cost)
    return whole if whole[0] >= gain + rest[0] else (gain + rest[0], groups + rest[1])


def _group(
    prefix_tokens: int, requests: Sequence[int], num_new_tokens: Sequence[int], cost: SharingCost
) -> tuple[float, list[PrefixGroup]]:
    """The group that saves the most, if any does: those with the fewest tokens gain the most by company. A
    prefill, which fills its own tiles, has nothing to gain."""
    order = sorted(requests, key=num_new_tokens.__getitem__)
    best_gain, best_size = 0.0, 0
    num_tokens = num_tiles = 0
    for size, index in enumerate(order, 1):
        num_tokens += num_new_tokens[index]
        num_tiles += cost.num_tiles(num_new_tokens[index])
        gain = prefix_tokens * (num_tiles - cost.num_tiles(num_tokens)) - cost.merge_tokens * num_tokens
        if gain > best_gain:
            best_gain, best_size = gain, size
    return best_gain, [(prefix_tokens, sorted(order[:best_size]))] if best_size else []
