"""In which order a batch's requests run, by what they share, and how many at a time, by the KV they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilestream.batch.lines import Line
from tilestream.batch.prefix_tree import best_groups, build_tree

# What an answer without max_tokens is taken to need, until answers of this batch have ended.
_USUAL_OUTPUT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Work:
    """A line that the engine can answer.

    Args:
        line: what is asked.
        prompt: token ids as the server makes them, int32; of the first prompt, where a line has several.
        num_sharing: choices of that prompt.
        num_tokens: of all its prompts, each counted once for each of its choices.
        output_tokens: most tokens of all its answers together.
        salt: prompts share pages within a salt.
    """

    line: Line
    prompt: np.ndarray
    num_sharing: int
    num_tokens: int
    output_tokens: int
    salt: str = ""

    @staticmethod
    def of(line: Line, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int | None], salt: str = "") -> Work:
        """From the engine requests that a line becomes: the token ids and max_tokens of each."""
        return Work(
            line,
            np.array(prompts[0], np.int32),
            sum(prompt == prompts[0] for prompt in prompts),
            sum(map(len, prompts)),
            sum(_USUAL_OUTPUT_TOKENS if n is None else n for n in max_tokens),
            salt,
        )


class WorkGroup:
    """Requests whose prompts begin with the same prefix_tokens, to be answered one after another."""

    def __init__(self, prefix_tokens: int, works: Sequence[Work]) -> None:
        self.prefix_tokens = prefix_tokens
        self.works = sorted(works, key=lambda work: -work.output_tokens)  # the last to end should not begin last
        self.num_left = len(works)

    @property
    def decode_share(self) -> float:
        """Answer tokens over the prompt tokens that have to be computed."""
        computed = self.prefix_tokens + sum(self.own_tokens(work) for work in self.works)
        return sum(work.output_tokens for work in self.works) / computed

    def own_tokens(self, work: Work) -> int:
        """Prompt tokens beyond the prefix."""
        return work.num_tokens - self.prefix_tokens * work.num_sharing


def in_shared_order(works: Sequence[Work], page_size: int) -> list[WorkGroup]:
    """All requests, by the groups that share the most, those with the longest answers for their prompts
    first: their decodes then run beside the prompts of those that come later."""
    by_salt: dict[str, list[Work]] = {}
    for work in works:
        by_salt.setdefault(work.salt, []).append(work)
    groups = []
    for same_salt in by_salt.values():
        for found in best_groups(build_tree([work.prompt for work in same_salt], page_size)):
            groups.append(WorkGroup(found.num_pages * page_size, [same_salt[i] for i in found.prompts]))
    return sorted(groups, key=lambda group: -group.decode_share)


def in_file_order(works: Sequence[Work]) -> list[WorkGroup]:
    """As they stand in the file, each by itself: what the shared order is measured against."""
    return [WorkGroup(0, [work]) for work in works]


class KvMemory:
    """The KV cache as requests in flight are expected to fill it. It decides how many run: a limit on their
    number would let short ones leave memory idle, and long ones push each other out.

    Answers are expected to be as much shorter than their limit as those that have ended; at first, as if one
    whole cache of answers had ended at their limits, since the first to end are the short ones.

    Args:
        capacity_tokens: of the cache.
        page_size: tokens per page.
    """

    def __init__(self, capacity_tokens: int, page_size: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._page_size = page_size
        self._taken: dict[str, int] = {}  # by line id
        self._taken_tokens = 0
        self._begun: set[WorkGroup] = set()
        self._asked_tokens = self._given_tokens = float(capacity_tokens)

    def fits(self, group: WorkGroup, work: Work) -> bool:
        """Whether this one may begin. Alone it always may: the engine says whether it fits at all."""
        need = self._need(group, work) + (0 if group in self._begun else group.prefix_tokens)
        return not self._taken or self._taken_tokens + need <= self._capacity_tokens

    def take(self, group: WorkGroup, work: Work) -> None:
        """A request begins; the first of its group brings the prefix."""
        if group not in self._begun:
            self._begun.add(group)
            self._taken_tokens += group.prefix_tokens
        self._taken[work.line.id] = self._need(group, work)
        self._taken_tokens += self._taken[work.line.id]

    def give_back(self, group: WorkGroup, work: Work, output_tokens: int) -> None:
        """A request has ended, with so many tokens of answers; the last of its group gives back the prefix."""
        self._taken_tokens -= self._taken.pop(work.line.id)
        group.num_left -= 1
        if group.num_left == 0:
            self._begun.remove(group)
            self._taken_tokens -= group.prefix_tokens
        self._asked_tokens += work.output_tokens
        self._given_tokens += min(output_tokens, work.output_tokens)

    def _need(self, group: WorkGroup, work: Work) -> int:
        answer = int(work.output_tokens * self._given_tokens / self._asked_tokens)
        return group.own_tokens(work) + answer + self._page_size * work.num_sharing
