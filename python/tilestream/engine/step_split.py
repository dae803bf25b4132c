"""A step cut in two by tokens, for one half's communication to run under the other's computation (tilestream.distributed.weave).

The cut goes through the step's tokens in their order, so it may go through a request. The first half's attention runs before
the second's: so the second part of a request sees the keys of the first, as does who shares pages that somebody before it
in the step fills. Only the part with its newest token samples.
"""

from __future__ import annotations

from tilestream.engine.prefix_groups import PrefixGroup
from tilestream.engine.step_plan import StepPlan


def split_step(plan: StepPlan, num_first: int) -> tuple[StepPlan, StepPlan]:
    """The step of the first num_first tokens and the step of the others; together they compute what `plan` does.

    A prefix group goes to both halves with the members that have tokens there, for its pages are filled before any of them
    attends; where fewer than two are left it has no company to share with, and is dropped.

    Args:
        plan: a step.
        num_first: tokens of the first half.
    Raises:
        ValueError: a half would be empty.
    """
    num_tokens = sum(item.num_new_tokens for item in plan.scheduled)  # a rank that follows has no counts
    if not 0 < num_first < num_tokens:
        raise ValueError(f"num_first is {num_first}; a step of {num_tokens} tokens is cut at 1..{num_tokens - 1}")
    first, second = StepPlan(), StepPlan()
    left = num_first
    num_whole = 0  # requests that are in the first half alone
    for item in plan.scheduled:
        num_here = min(item.num_new_tokens, left)
        num_there = item.num_new_tokens - num_here
        left -= num_here
        num_whole += num_there == 0
        if num_here:
            first.add_part(item.request, item.start, num_here, samples=item.samples and not num_there)
        if num_there:
            second.add_part(item.request, item.start + num_here, num_there, samples=item.samples)
    first.prefix_groups = _groups_of(range(len(first.scheduled)), plan.prefix_groups)
    second.prefix_groups = _groups_of(range(num_whole, len(plan.scheduled)), plan.prefix_groups)
    return first, second


def _groups_of(items: range, groups: list[PrefixGroup]) -> list[PrefixGroup]:
    """The groups among these of a step's items, counted from the first of them."""
    kept = ((tokens, [index - items.start for index in members if index in items]) for tokens, members in groups)
    return [group for group in kept if len(group[1]) > 1]
