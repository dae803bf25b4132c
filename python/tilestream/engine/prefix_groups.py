"""Which requests of a step hold the same leading pages, so that one job can attend to them for all."""

from __future__ import annotations

from collections.abc import Sequence

# A group saves reading its prefix's keys members - 1 times, and costs each member one more partial result
# and a merge. Below these bounds that is no clear gain (estimate; to be set from bench measurements).
MIN_MEMBERS = 4
MIN_SAVED_TOKENS = 4096

PrefixGroup = tuple[int, list[int]]  # (prefix_tokens, indices of the members in the step)


def find_prefix_groups(
    page_lists: Sequence[Sequence[int]], num_prefix_pages: Sequence[int], page_size: int
) -> list[PrefixGroup]:
    """Group requests by shared leading pages, by page ids and nothing else.

    A group needs MIN_MEMBERS members and must save MIN_SAVED_TOKENS = prefix_tokens * (members - 1). Where
    a set of requests shares a short prefix and subsets of it share longer ones, the choice that saves more
    is taken (one level: a request is in at most one group).

    Args:
        page_lists: page ids of each request of the step, in sequence order.
        num_prefix_pages: how many of them, from the front, are full and computed before this step.
        page_size: tokens per page.
    Returns:
        Groups in order of their first member. Linear in the pages of requests whose first page is shared.
    """
    if len(page_lists) < MIN_MEMBERS:
        return []
    by_first_page: dict[int, list[int]] = {}
    for index, num_pages in enumerate(num_prefix_pages):
        if num_pages > 0:
            by_first_page.setdefault(page_lists[index][0], []).append(index)
    groups: list[PrefixGroup] = []
    for members in by_first_page.values():
        if len(members) >= MIN_MEMBERS:
            prefixes = {index: list(page_lists[index][: num_prefix_pages[index]]) for index in members}
            groups += _best_groups(prefixes, members, page_size)
    return [group for group in groups if _saved_tokens(group) >= MIN_SAVED_TOKENS]


def _saved_tokens(group: PrefixGroup) -> int:
    prefix_tokens, members = group
    return prefix_tokens * (len(members) - 1)


def _best_groups(prefixes: dict[int, list[int]], members: list[int], page_size: int) -> list[PrefixGroup]:
    """Keep `members`, which share a first page, as one group, or split them where they part."""
    # What the lexicographically first and last have in common, all have in common.
    first, last = min(prefixes[index] for index in members), max(prefixes[index] for index in members)
    depth = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    whole = (depth * page_size, members)
    by_next_page: dict[int, list[int]] = {}
    for index in members:
        if len(prefixes[index]) > depth:
            by_next_page.setdefault(prefixes[index][depth], []).append(index)
    parts: list[PrefixGroup] = []
    for part in by_next_page.values():
        if len(part) >= MIN_MEMBERS:
            parts += _best_groups(prefixes, part, page_size)
    return parts if sum(map(_saved_tokens, parts)) > _saved_tokens(whole) else [whole]
