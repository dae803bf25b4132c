"""What ranks do with a model in tests: rank 0 has the engine and sends its steps to the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tilestream.distributed import Communicator
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

from tests.distributed.ranks import Rank
from tests.models.helpers import PagedRunner

LIMITS = EngineConfig(kv_cache_tokens=2048, max_model_len=256, page_size=16, token_budget=24, max_num_seqs=8, seed=0)


@dataclass
class Load:
    """A model, options of load_model, and how it is run.

    overlaps: steps are launched before the one before is read, as on a GPU.
    """

    path: Path | str
    options: dict[str, Any] = field(default_factory=dict)
    kv_dtype: str = "float32"
    overlaps: bool = False


class SendingRunner(ModelRunner):
    """Rank 0's: the others get each step before it runs."""

    rank: Rank

    def launch(self, plan: StepPlan):
        items = [
            (item.request.token_ids, item.request.pages, item.start, item.num_new_tokens, item.samples) for item in plan.scheduled
        ]
        self.rank.send((items, plan.prefix_groups, draw_plan(plan)))
        return super().launch(plan)


def _connect(rank: Rank | None) -> Callable[[ModelConfig], Communicator] | None:
    """For load_model; rank None: alone."""
    if rank is None:
        return None
    return lambda config: rank.connect(scratch_bytes(config, CPU, most_step_tokens(LIMITS.token_budget, LIMITS.max_num_seqs))[0])


def answers(rank: Rank | None, load: Load, prompts: list[list[int]], params: list[SamplingParams]) -> list | None:
    """(tokens, logprobs, prompt's logprobs) of each prompt, in one engine; None on ranks that follow."""
    loaded = load_model(load.path, **load.options, connect=_connect(rank))
    runner = (ModelRunner if rank is None else SendingRunner)(loaded.model, LIMITS, kv_dtype=load.kv_dtype)
    runner.overlaps = load.overlaps
    if rank is not None and rank.from_first is not None:
        while (message := rank.from_first.recv()) is not None:
            items, prefix_groups, draws = message
            runner.follow(StepPlan([_item(*item) for item in items], prefix_groups), draws)
        return None
    runner.rank = rank
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
    if rank is not None:
        rank.send(None)
    return results


def _item(token_ids: list[int], pages: list[int], *rest: Any) -> ScheduledRequest:
    return ScheduledRequest(SimpleNamespace(token_ids=token_ids, pages=pages), *rest)


def logits(rank: Rank | None, load: Load, token_ids: list[int]) -> tuple[torch.Tensor, int]:
    """This rank's logits of all tokens, of prefill in chunks and the last ones of decodes; and the bytes of its weights."""
    loaded = load_model(load.path, **load.options, connect=_connect(rank))
    loaded.model.reserve(most_step_tokens(LIMITS), num_rows=1, num_positions=len(token_ids))
    runner, end, size = PagedRunner(loaded.model), len(token_ids) - 3, most_step_tokens(LIMITS)
    chunks = [token_ids[begin : min(begin + size, end)] for begin in range(0, end, size)] + [[token] for token in token_ids[end:]]
    return torch.cat([runner.step({0: chunk}) for chunk in chunks]), loaded.weight_bytes
