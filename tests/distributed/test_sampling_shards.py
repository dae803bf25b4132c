"""Draws from parts of the vocabulary are those from whole rows, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tilestream.engine.batch import SamplingInputs
from tilestream.engine.sampling_shards import DrawPlan, VocabularyShards, draw_plan, sample_candidates
from tilestream.engine.step_plan import ScheduledRequest, StepPlan
from tilestream.ops import sample
from tilestream.sampling_params import SamplingParams

VOCAB_SIZE = 1000
NAN, INF = float("nan"), float("inf")


class Gathering:
    """Ranks as threads; sent: bytes of a rank in each call."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.given, self.barrier = world_size, [None] * world_size, Barrier(world_size)
        self.sent: list[int] = []

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        def of_rank(rank: int) -> Any:
            try:
                return function(SimpleNamespace(rank=rank, all_gather=self.gather_from(rank)))
            except BaseException:
                self.barrier.abort()  # or the others wait for this one
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(of_rank, range(self.world_size)))

    def gather_from(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def all_gather(x: torch.Tensor) -> torch.Tensor:
            assert x.is_contiguous()
            self.given[rank] = x
            self.barrier.wait()
            if rank == 0:
                self.sent.append(x.nbytes)
                assert {(other.shape, other.dtype) for other in self.given} == {(x.shape, x.dtype)}
            result = torch.stack(self.given)
            self.barrier.wait()
            return result

        return all_gather


def vocabularies(world_size: int) -> list[range]:
    bounds = [rank * VOCAB_SIZE // world_size // 32 * 32 for rank in range(world_size)] + [VOCAB_SIZE]
    return [range(*bounds[rank : rank + 2]) for rank in range(world_size)]


def random_logits(num_rows: int, seed: int) -> torch.Tensor:
    """A third of the rows has many equal logits, of the others some have values that are no numbers."""
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    logits[::3] = logits[::3].round()
    logits[1::6, 700:] = -INF
    logits[4::12, 500] = NAN
    logits[7::12, 3] = INF
    logits[10::12] = -INF
    logits[2::9, ::2] = -0.0
    logits[2::9, 1::2] = 0.0
    return logits


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("top_ks", [(1,), (0, 1, 2, 5), (40,), (5, 256)])  # 0: greedy
def test_tokens_are_those_of_whole_rows(world_size: int, top_ks: tuple[int, ...]) -> None:
    num_rows = 96
    logits = random_logits(num_rows, world_size)
    top_k = torch.tensor([top_ks[row % len(top_ks)] for row in range(num_rows)], dtype=torch.int32)
    draw = torch.Generator().manual_seed(1)
    s = SamplingInputs(
        temperature=torch.where(top_k == 0, 0.0, torch.rand(num_rows, generator=draw) * 2 + 0.1),
        top_k=top_k,
        top_p=torch.where(torch.rand(num_rows, generator=draw) < 0.5, 1.0, 0.8),
        min_p=torch.where(torch.rand(num_rows, generator=draw) < 0.5, 0.0, 0.02),
        seeds=torch.arange(num_rows),
        positions=torch.arange(num_rows) * 7,
        penalties=None,
        num_top_logprobs=None,
    )
    want = sample(
        logits, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.positions, num_top_logprobs=None
    ).tokens
    parts = vocabularies(world_size)

    def of_rank(communicator) -> torch.Tensor | None:
        shards, ids = VocabularyShards(communicator, parts), parts[communicator.rank]
        return shards.candidates(logits[:, ids.start : ids.stop].contiguous(), max(1, *top_ks))

    keys, *others = Gathering(world_size).run(of_rank)
    assert others == [None] * (world_size - 1)
    assert torch.equal(sample_candidates(keys, s), want)
    assert (want >= 0).any() and (want == -1).any()


def draws_of(num_rows: int, num_top_p: int, seed: int) -> SamplingInputs:
    """Of every kind that takes no candidates: the first num_top_p rows with top_p, the temperature tiny, huge or 0 in some."""
    draw = torch.Generator().manual_seed(seed)

    def one_of(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (num_rows,), generator=draw)]

    return SamplingInputs(
        temperature=one_of(1.0, 1.0, 0.7, 1.3, 0.2, 1e-30, 1e30, 0.0),
        top_k=torch.zeros(num_rows, dtype=torch.int32),
        top_p=torch.where(torch.arange(num_rows) < num_top_p, one_of(0.9, 0.5, 0.999, 1e-6), 1.0),
        min_p=one_of(0.0, 0.0, 0.05, 1.0),
        seeds=torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=draw),
        positions=torch.arange(num_rows) * 7,
        penalties=None,
        num_top_logprobs=None,
    )


@pytest.mark.parametrize("num_top_p", [0, 50, 96])
@pytest.mark.parametrize(
    "parts",
    [vocabularies(world_size) for world_size in (2, 3, 4, 8)]
    + [[range(*pair) for pair in pairwise(bounds)] for bounds in ([0, 1, 1000], [0, 999, 1000], [0, 7, 8, 500, 1000])],
    ids=lambda parts: "-".join(str(len(ids)) for ids in parts),
)
def test_draws_where_the_logits_are(parts: list[range], num_top_p: int) -> None:
    num_rows, world_size = 96, len(parts)
    logits, s = random_logits(num_rows, world_size), draws_of(num_rows, num_top_p, num_top_p)
    want = sample(
        logits, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.positions, num_top_logprobs=None
    ).tokens

    def of_rank(communicator) -> torch.Tensor:
        shards, ids = VocabularyShards(communicator, parts), parts[communicator.rank]
        own = shards.drawn(logits[:, ids.start : ids.stop], s if communicator.rank == 0 else None, num_top_p)
        assert bool(((own == -1) | ((own >= ids.start) & (own < ids.stop))).all())
        return shards.agreed(own)

    for tokens in Gathering(world_size).run(of_rank):
        assert torch.equal(tokens, want)
    assert (want >= 0).any() and (want == -1).any()


@pytest.mark.parametrize(("num_top_p", "calls", "row_bytes"), [(0, 3, 48), (4, 7, 8240)])
def test_what_crosses(num_top_p: int, calls: int, row_bytes: int) -> None:
    """Of a rank and row, whatever the vocabulary: as docs/tensor_parallel.md says."""
    parts, s, gathering = vocabularies(2), draws_of(4, num_top_p, 0), Gathering(2)

    def of_rank(communicator) -> None:
        shards = VocabularyShards(communicator, parts)
        shards.agreed(shards.drawn(torch.zeros(4, len(parts[communicator.rank])), s, num_top_p))

    gathering.run(of_rank)
    assert (len(gathering.sent), sum(gathering.sent)) == (calls, 4 * row_bytes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_whole_rows(world_size: int) -> None:
    logits, parts = random_logits(12, 0), vocabularies(world_size)

    def of_rank(communicator) -> torch.Tensor | None:
        ids = parts[communicator.rank]
        return VocabularyShards(communicator, parts).whole(logits[:, ids.start : ids.stop].contiguous())

    whole, *others = Gathering(world_size).run(of_rank)
    assert torch.equal(whole.view(torch.int32), logits.view(torch.int32))
    assert others == [None] * (world_size - 1)


def item(samples: bool, num_new_tokens: int = 1, **params: Any) -> ScheduledRequest:
    edits = params.pop("edits_logits", False)
    scored = params.pop("scored", False)
    request = SimpleNamespace(
        params=SamplingParams(**params), edits_logits=edits, lacks_prompt_logprobs=scored, num_prompt_tokens=50
    )
    return ScheduledRequest(request, 0, num_new_tokens, samples)


def test_a_plan_says_which_rows_need_what() -> None:
    plan = StepPlan(
        [
            item(True, temperature=0.0),
            item(True, temperature=0.7, top_k=40),
            item(True, temperature=0.7),
            item(True, temperature=0.7, top_k=257),
            item(False, temperature=0.7),
            item(True, 60, temperature=0.0, scored=True),
            item(True, temperature=0.0, logprobs=2),
            item(True, temperature=0.0, repetition_penalty=1.1),
            item(True, temperature=0.0, edits_logits=True),
            item(True, temperature=0.7, top_k=256),
            item(True, temperature=0.7, top_p=0.9),
            item(True, temperature=0.7, min_p=0.1),
            item(True, temperature=0.7, top_p=0.5, min_p=0.1),
            item(True, temperature=0.7, top_p=0.9, top_k=300),
            item(True, temperature=0.7, top_p=0.9, logprobs=0),
            item(True, temperature=0.7, presence_penalty=0.1),
            item(True, temperature=0.7, edits_logits=True),
        ]
    )
    draws = draw_plan(plan)
    assert draws == DrawPlan(
        few=(0, 1, 4, 8),
        num_candidates=256,
        parted=(9, 11, 2, 10),
        num_top_p=2,
        whole=(3, 5, 6, 7, 12, 13, 14, 15),
        scored=((5, 32), (37, 17)),
    )
    assert draws.num_rows == sum(each.samples for each in plan.scheduled) == 16
    assert draw_plan(StepPlan([item(False)])) == DrawPlan((), 0, (), 0, (), ())
