"""Draws of two processes that have half of the vocabulary each: by masses, against rank 0 gathering whole rows and sampling.

Each rank has one thread, on a CPU of its own. The time is rank 0's, from when the ranks have met until it has the tokens. On
shared memory a gathered row costs a copy; what masses are for is a wire: they are a few KB a row, whatever the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from tilestream.engine.batch import SamplingInputs
from tilestream.engine.sampling_shards import VocabularyShards
from tilestream.ops import sample
from tilestream.testing import Ranks

from bench.harness import Report
from bench.two_ranks import SETTLE_S, connected, time_calls

ROUNDS, NUM_CALLS = 15, 20
KINDS = {"temperature": 1.0, "top-p 0.9": 0.9}


def settings_of(num_rows: int, top_p: float) -> SamplingInputs:
    rows = torch.arange(num_rows)
    return SamplingInputs(
        temperature=torch.ones(num_rows), top_k=torch.zeros(num_rows, dtype=torch.int32), top_p=torch.full((num_rows,), top_p),
        min_p=torch.zeros(num_rows), seeds=rows, positions=rows, penalties=None, num_top_logprobs=None,
    )  # fmt: skip


def measure(rank: int, num_rows: int, vocab_size: int, top_p: float, scale: float) -> dict[str, list[float]]:
    """Seconds of each round, both ways in turn."""
    parts = [range(vocab_size // 2), range(vocab_size // 2, vocab_size)]
    shards, s = VocabularyShards(connected(), parts), settings_of(num_rows, top_p)
    rows = scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    logits = rows[:, parts[rank].start : parts[rank].stop].contiguous()

    def by_masses() -> torch.Tensor:
        return shards.agreed(shards.drawn(logits, s if rank == 0 else None, num_rows if top_p < 1.0 else 0))

    def whole() -> torch.Tensor | None:
        gathered = shards.whole(logits)
        if gathered is None:
            return None
        return sample(
            gathered, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, s.positions, num_top_logprobs=None
        ).tokens

    ways: dict[str, Callable[[], torch.Tensor | None]] = {"by masses": by_masses, "whole rows": whole}
    tokens, gathered = by_masses(), whole()
    assert rank > 0 or torch.equal(tokens, gathered)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            time.sleep(SETTLE_S)
            times[name].append(time_calls(lambda: None, run, NUM_CALLS))
    return times


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("vocab_size", [49_152, 128_256])
@pytest.mark.parametrize("kind", KINDS)
def test_shard_draw(kind: str, vocab_size: int, num_rows: int, scale: float, ranks: Ranks, report: Report) -> None:
    times = ranks.call(measure, num_rows, vocab_size, KINDS[kind], scale)[0]
    report.add("draw", f"{kind}, {num_rows} x {vocab_size}, logits of deviation {scale:g}, 2 ranks", times)
