"""One tree over all prompts of a batch, and the one level of sharing that saves the most (BatchLLM, 2412.03594).

A group of requests computes and reads its shared prefix once, and then it is done with: so every request is
in one group, and the tree is flattened to one level. Which of its nodes become groups is the question: a deep
node shares more tokens among fewer requests, and computes what it has in common with its neighbours again.
Counted in whole pages, since only those are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


@dataclass(slots=True)
class Node:
    """Prompts whose first num_pages are the same. `prompts` are those that have no more whole pages."""

    num_pages: int
    children: list[Node] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Group:
    """prompts: indices; their first num_pages are equal. num_pages is 0 for those that share with nobody."""

    num_pages: int
    prompts: tuple[int, ...]


def build_tree(prompts: Sequence[np.ndarray], page_size: int) -> Node:
    """The compact prefix tree.

    Args:
        prompts: token ids of each, int32.
        page_size: tokens per page. A prompt's last token is never shared: its logits are wanted.
    Returns:
        The root, of no pages.
    """
    shareable = [prompt[: max(0, len(prompt) - 1) // page_size * page_size] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: shareable[i].tobytes())
    common = [0, *(_num_common(shareable[a], shareable[b]) // page_size for a, b in pairwise(order))]
    root = Node(0)
    path = [root]
    for index, num_common in zip(order, common):
        _close(path, num_common)
        num_pages = len(shareable[index]) // page_size
        if num_pages > path[-1].num_pages:
            path.append(Node(num_pages))
        path[-1].prompts.append(index)
    _close(path, 0)
    return root


def best_groups(root: Node) -> list[Group]:
    """The groups that save the most prompt tokens, each prompt in exactly one.

    Dynamic programming over (node, nearest ancestor that is a group): a prompt belongs to the deepest group
    on its way from the root, saves that group's pages, and a group costs its pages once.

    Returns:
        Groups in the order of the tree, so that neighbours have the most in common.
    """
    nodes, parents = _in_order(root)
    # The depths of the nodes above each, from the root on, and for each of these what the subtree saves when
    # that one is the nearest group above it.
    depths: list[np.ndarray] = []
    for node, parent in zip(nodes, parents):
        above = np.empty(0, np.int64) if parent < 0 else np.append(depths[parent], nodes[parent].num_pages)
        depths.append(above)
    inside = [len(node.prompts) * np.append(above, node.num_pages) for node, above in zip(nodes, depths)]
    is_group = [np.empty(0, bool)] * len(nodes)
    for index in range(len(nodes) - 1, 0, -1):  # children before parents
        saved_closed, saved_open = inside[index][:-1], inside[index][-1] - nodes[index].num_pages
        is_group[index] = saved_open > saved_closed
        inside[parents[index]] += np.maximum(saved_closed, saved_open)
    members: dict[int, list[int]] = {}
    group_of = [0] * len(nodes)
    level = [0] * len(nodes)
    for index, node in enumerate(nodes):
        if index > 0:
            nearest = group_of[parents[index]]
            level[index] = level[parents[index]] + 1
            group_of[index] = index if is_group[index][level[nearest]] else nearest
        members.setdefault(group_of[index], []).extend(node.prompts)
    groups = [Group(nodes[index].num_pages, tuple(prompts)) for index, prompts in members.items() if index > 0]
    return groups + [Group(0, (prompt,)) for prompt in members.get(0, ())]


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differing = a[:length] != b[:length]
    return int(differing.argmax()) if differing.any() else length


def _close(path: list[Node], num_pages: int) -> None:
    """Leave the nodes of the path that are deeper than num_pages, each hung into the one above; the path then
    ends at that depth, if anything was left."""
    while path[-1].num_pages > num_pages:
        node = path.pop()
        if path[-1].num_pages < num_pages:
            path.append(Node(num_pages))
        path[-1].children.append(node)


def _in_order(root: Node) -> tuple[list[Node], list[int]]:
    """All nodes, parents first, and the place of each one's parent (-1: the root). No recursion: chats are deep."""
    nodes, parents = [], []
    stack = [(root, -1)]
    while stack:
        node, parent = stack.pop()
        stack += [(child, len(nodes)) for child in reversed(node.children)]
        nodes.append(node)
        parents.append(parent)
    return nodes, parents
