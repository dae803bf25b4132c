"""One step, as plain data: what it computes, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tilestream.engine.cost_model import prefill_pairs
from tilestream.engine.prefix_groups import PrefixGroup
from tilestream.engine.request import Request


@dataclass(slots=True)
class ScheduledRequest:
    """Tokens [start, start + num_new_tokens) of `request` run in this step; its pages cover them."""

    request: Request
    start: int  # tokens computed before this step
    num_new_tokens: int
    samples: bool  # the last of them is the request's newest token: its logits are sampled


@dataclass(slots=True)
class StepPlan:
    """One step, as data: decodes first, then prefill chunks, each in the order of `Scheduler.running`.

    prefix_groups: (prefix_tokens, indices into scheduled) of requests that hold the same leading pages.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    prefix_groups: list[PrefixGroup] = field(default_factory=list)
    num_tokens: int = 0
    num_samples: int = 0
    num_prefill_tokens: int = 0  # in chunks of more than one token
    num_prefill_pairs: int = 0  # (query, key) pairs of those
    num_decode_keys: int = 0  # keys that the others read

    def add(self, request: Request, num_new_tokens: int) -> None:
        start = request.num_computed_tokens
        self.add_part(request, start, num_new_tokens, samples=start + num_new_tokens == len(request.token_ids))

    def add_part(self, request: Request, start: int, num_new_tokens: int, *, samples: bool) -> None:
        self.scheduled.append(ScheduledRequest(request, start, num_new_tokens, samples))
        self.num_tokens += num_new_tokens
        self.num_samples += samples
        if num_new_tokens == 1:
            self.num_decode_keys += start + 1
        else:
            self.num_prefill_tokens += num_new_tokens
            self.num_prefill_pairs += prefill_pairs(start, num_new_tokens)


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step on its way, what the runner gave for it, and when it began."""

    plan: StepPlan
    handle: Any
    begin_s: float


@dataclass(slots=True)
class SampledTokens:
    """What the runner gives back for a StepPlan: one row per item with `samples`, in plan order.

    token_ids: the drawn tokens; -1: the row's logits hold a NaN, or nothing finite to draw from.
    logprobs: of the drawn tokens, natural log of the model's own probabilities.
    top_ids, top_logprobs: per row, most likely first, at least as many as its request's params.logprobs.
    None when no request of the step asked for logprobs.
    prompt_scores: of requests that asked for logprobs of their prompt.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    prompt_scores: list[PromptScores] = field(default_factory=list)


@dataclass(slots=True)
class PromptScores:
    """Logprobs of a request's prompt tokens from position `start` on, and of the most likely ones in their places."""

    request: Request
    start: int
    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
