"""Sampling: one op, with and without logprobs, against the torch paths that engines use (none of which gives any).

Peers: argmax; topk(50), softmax, top-p, multinomial; the full sort that top-p alone needs. Limit: the logits read once.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import Report, interleave
from bench.roofs import Work
from tilestream import ops

VOCAB_SIZE = 128_256  # Llama 3
TOP_K, TOP_P = 50, 0.9


def torch_greedy(logits: torch.Tensor) -> torch.Tensor:
    return torch.argmax(logits, -1)


def _draw(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(values, -1)
    before = probs.cumsum(-1) - probs
    probs = torch.where(before > TOP_P, 0.0, probs)
    return ids.gather(1, torch.multinomial(probs, 1))


def torch_top_k_top_p(logits: torch.Tensor) -> torch.Tensor:
    return _draw(*torch.topk(logits, TOP_K))


def torch_top_p(logits: torch.Tensor) -> torch.Tensor:
    return _draw(*torch.sort(logits, descending=True))


KINDS = {
    "greedy": (0.0, 0, 1.0, torch_greedy),
    "top-k 50, top-p 0.9": (1.0, TOP_K, TOP_P, torch_top_k_top_p),
    "top-p 0.9": (1.0, 0, TOP_P, torch_top_p),
}


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_sample(report: Report, kind: str, batch_size: int, scale: float) -> None:
    temperature, top_k, top_p, peer = KINDS[kind]
    logits = scale * torch.randn(batch_size, VOCAB_SIZE)
    rows = torch.arange(batch_size)
    arguments = (
        torch.full((batch_size,), temperature), torch.full((batch_size,), top_k, dtype=torch.int32),
        torch.full((batch_size,), top_p), torch.zeros(batch_size), rows, rows,
    )
    assert torch.equal(ops.sample(logits, torch.zeros(batch_size), *arguments[1:]).tokens, torch_greedy(logits))
    tokens = torch.empty(batch_size, dtype=torch.int64)
    no_top = (torch.empty(batch_size, 0, dtype=torch.int64), torch.empty(batch_size, 0))

    def ours(logprobs: torch.Tensor | None) -> None:
        torch.ops.tilestream.sample(logits, *arguments, *(None,) * 6, tokens, logprobs, *no_top)

    logprobs = torch.empty(batch_size)
    rounds = 5 if peer is torch_top_p and batch_size > 1 else 25
    candidates = {"ours": lambda: ours(None), "with logprobs": lambda: ours(logprobs), "torch": lambda: peer(logits)}
    case = f"{kind}, {batch_size} x {VOCAB_SIZE}, logits of deviation {scale:g}"
    report.add("sample", case, interleave(candidates, rounds=rounds), work=Work(logits.nbytes))
