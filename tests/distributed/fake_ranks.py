"""Ranks without a model: each keeps pages as tests/engine/fakes.py does, and in every step all compare what they hold."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tilestream.distributed.control import Build
from tilestream.distributed.launch import gather
from tilestream.distributed.ranks import Ranks
from tilestream.distributed.tensor_parallel_runner import TensorParallelRunner
from tilestream.distributed.torchrun import Place
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.step_plan import SampledTokens, StepPlan

from tests.engine.fakes import COSTS, ByteTokenizer, FakeRunner, mix

_MOST = 512  # states and tokens of a step


class Exchange:
    """Every rank's KV at the end of each item of a step, and rank 0's tokens."""

    def compare(self, states: list[int], drawn: list[int] | None) -> list[int]:
        """Rank 0's tokens."""
        mine = torch.zeros(2, _MOST, dtype=torch.int64)
        mine[0, : len(states)] = torch.tensor(states)
        if drawn is not None:
            mine[1, : len(drawn)] = torch.tensor(drawn)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        for rank, other in enumerate(everyone):
            if not torch.equal(other[0], mine[0]):
                raise AssertionError(f"rank {rank} holds other KV than rank {dist.get_rank()}")
        return everyone[0][1].tolist()


class FakeFollower:
    """As FakeRunner, on another rank."""

    def __init__(self, config: EngineConfig, misbehave: Callable[[int], None]) -> None:
        self.page_size = config.page_size
        self.kv: dict[tuple[int, int], int] = {}
        self.drawn: list[int] = []
        self.num_steps = 0
        self.misbehave = misbehave
        self.exchange = Exchange()

    def follow(self, plan: StepPlan, draws: Any) -> None:
        assert draws == [item.samples for item in plan.scheduled]
        self.num_steps += 1
        self.misbehave(self.num_steps)
        size, states = self.page_size, []
        for item in plan.scheduled:
            pages, end = item.request.pages, item.start + item.num_new_tokens
            state = self.kv[pages[(item.start - 1) // size], (item.start - 1) % size] if item.start else 0
            states.append(state)
            for position, token_id in zip(range(item.start, end), item.request.token_ids[item.start : end], strict=True):
                state = mix(state, token_id if token_id >= 0 else self.drawn[-1 - token_id])
                self.kv[pages[position // size], position % size] = state
        self.drawn = self.exchange.compare(ends(plan, self.kv, size), None)

    def clear_pages(self, num_pages: int) -> None:
        self.kv = cleared(num_pages, self.page_size)


def cleared(num_pages: int, page_size: int) -> dict[tuple[int, int], int]:
    return {(page, i): 0 for page in range(num_pages) for i in range(page_size)}


def ends(plan: StepPlan, kv: dict[tuple[int, int], int], page_size: int) -> list[int]:
    places = [(item.request.pages, item.start + item.num_new_tokens - 1) for item in plan.scheduled]
    return [kv[pages[last // page_size], last % page_size] for pages, last in places]


class FakePart:
    room_tokens = weight_bytes = 1

    def __init__(self, misbehave: Callable[[int], None]) -> None:
        self.misbehave = misbehave

    def build(self, config: EngineConfig) -> FakeFollower:
        return FakeFollower(config, self.misbehave)


class FirstRunner(FakeRunner):
    """Rank 0's."""

    exchange = Exchange()

    def launch(self, plan: StepPlan, draws: Any) -> SampledTokens:
        assert draws == [item.samples for item in plan.scheduled]
        sampled = super().launch(plan)
        self.exchange.compare(ends(plan, self.kv, self.config.page_size), sampled.token_ids)
        return sampled

    def clear_pages(self, num_pages: int) -> None:
        self.kv = cleared(num_pages, self.config.page_size)


def load(faults: dict[int, tuple[str, int]], place: Place) -> FakePart:
    """What the workers do first.

    Args:
        faults: of a rank: "load", "raise", "kill" or "sleep", and in which step.
    """
    kind, at = faults.get(place.rank, ("none", 0))
    if kind == "load":
        raise OSError(f"rank {place.rank} has no such file")

    def misbehave(step: int) -> None:
        if step != at:
            return
        if kind == "raise":
            raise MemoryError("no more room")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "sleep":
            time.sleep(60)

    return FakePart(misbehave)


def make_ranks(world_size: int, faults: dict[int, tuple[str, int]]) -> Ranks:
    return gather(world_size, functools.partial(load, faults))[0]


def make_engine(ranks: Ranks, config: EngineConfig, *, overlaps: bool = False) -> Engine:
    """An engine whose steps all ranks run."""
    ranks.tell(Build(config))
    ranks.answers()
    first = FirstRunner(config, overlaps=overlaps)
    runner = TensorParallelRunner(first, ranks, lambda plan: [item.samples for item in plan.scheduled])
    first.engine = Engine(runner, ByteTokenizer(), config, COSTS)
    return first.engine
