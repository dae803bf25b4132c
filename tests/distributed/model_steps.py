"""What ranks do with a model in tests: rank 0 has the engine and tells the others its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tilestream.distributed import Communicator, connect
from tilestream.distributed.weave import SplitRule
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.runner import ModelRunner, most_step_tokens
from tilestream.engine.sampling_shards import draw_plan
from tilestream.engine.step_plan import ScheduledRequest, StepPlan
from tilestream.layers.scratch import scratch_bytes
from tilestream.models import load_model
from tilestream.models.config import ModelConfig
from tilestream.placement import CPU
from tilestream.sampling_params import SamplingParams

from bench import tune_weave
from tests.models.helpers import PagedRunner

LIMITS = EngineConfig(kv_cache_tokens=2048, max_model_len=256, page_size=16, token_budget=24, max_num_seqs=8, seed=0)


@functools.cache
def group_of(world_size: int) -> dist.ProcessGroup:
    """Of the first ranks; made by all of them."""
    return dist.new_group(list(range(world_size)))


@dataclass(frozen=True)
class Group:
    """The first world_size ranks, joined by `transport`. Only these do anything."""

    world_size: int
    transport: str

    def run(self, rank: int, function: Callable, *args: Any) -> Any:
        group = group_of(self.world_size)
        return function(Member(rank, group, self.transport), *args) if rank < self.world_size else None


@dataclass(frozen=True)
class Member:
    """A rank in its group."""

    rank: int
    group: dist.ProcessGroup
    transport: str

    def connect(self, config: ModelConfig) -> Communicator:
        num_bytes = scratch_bytes(config, CPU, most_step_tokens(LIMITS))[0]
        return connect(self.group, CPU, num_bytes=num_bytes, transport=self.transport)

    def from_first(self, message: Any = None) -> Any:
        """Rank 0's message, on all ranks."""
        box = [message]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]


@dataclass
class Load:
    """A model, options of load_model, and how it is run.

    overlaps: steps are launched before the one before is read, as on a GPU.
    split_rule: of several ranks, which steps run in two halves.
    """

    path: Path | str
    options: dict[str, Any] = field(default_factory=dict)
    kv_dtype: str = "float32"
    overlaps: bool = False
    split_rule: SplitRule | None = None


class TellingRunner(ModelRunner):
    """Rank 0's: the others get each step before it runs."""

    member: Member

    def launch(self, plan: StepPlan):
        items = [
            (item.request.token_ids, item.request.pages, item.start, item.num_new_tokens, item.samples) for item in plan.scheduled
        ]
        draws = draw_plan(plan)
        self.member.from_first((items, plan.prefix_groups, draws))
        return super().launch(plan, draws)


def answers(member: Member | None, load: Load, prompts: list[list[int]], params: list[SamplingParams]) -> list | None:
    """(tokens, logprobs, prompt's logprobs) of each prompt, in one engine; None on ranks that follow. No member: alone."""
    loaded = load_model(load.path, **load.options, connect=member and member.connect)
    runner = (TellingRunner if member else ModelRunner)(loaded.model, LIMITS, kv_dtype=load.kv_dtype)
    runner.overlaps = load.overlaps
    if member:
        runner.split_rule = load.split_rule
    if member and member.rank > 0:
        while (message := member.from_first()) is not None:
            items, prefix_groups, draws = message
            runner.follow(StepPlan([_item(*item) for item in items], prefix_groups), draws)
        return loaded.model.communicator.close()
    runner.member = member
    engine = Engine(runner, loaded.tokenizer, LIMITS)
    for i, (token_ids, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), token_ids, each)
    results = [([], [], []) for _ in prompts]
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            tokens, logprobs, prompt_logprobs = results[int(delta.request_id)]
            tokens += delta.token_ids
            logprobs += delta.logprobs or []
            prompt_logprobs += delta.prompt_logprobs or []
    if member:
        member.from_first(None)
        loaded.model.communicator.close()
    return results


def _item(token_ids: list[int], pages: list[int], *rest: Any) -> ScheduledRequest:
    return ScheduledRequest(SimpleNamespace(token_ids=token_ids, pages=pages), *rest)


def logits(member: Member | None, load: Load, token_ids: list[int]) -> tuple[torch.Tensor, int]:
    """This rank's logits of all tokens, of prefill in chunks and the last ones of decodes; and the bytes of its weights."""
    loaded = load_model(load.path, **load.options, connect=member and member.connect)
    loaded.model.reserve(most_step_tokens(LIMITS), num_rows=1, num_positions=len(token_ids))
    runner, end, size = PagedRunner(loaded.model), len(token_ids) - 3, most_step_tokens(LIMITS)
    chunks = [token_ids[begin : min(begin + size, end)] for begin in range(0, end, size)] + [[token] for token in token_ids[end:]]
    result = torch.cat([runner.step({0: chunk}) for chunk in chunks])
    assert bool(loaded.model._programs._programs) == (member is None or member.transport == "shared memory")
    if member:
        loaded.model.communicator.close()
    return result, loaded.weight_bytes


def cut_times(member: Member, path: Path, rule: SplitRule) -> tune_weave.Times:
    """What bench/tune_weave.py measures, of ranks on a CPU."""
    model = load_model(path, dtype="float32", connect=member.connect).model
    limits = replace(LIMITS, page_size=tune_weave.PAGE_SIZE)
    return tune_weave.measure(ModelRunner(model, limits, kv_dtype="float32"), rule, (8, 24), rounds=2)
