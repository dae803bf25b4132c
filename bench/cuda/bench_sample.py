"""Sampling on a GPU, against the torch paths that engines use

Peers: argmax; topk(50) and a draw; the full sort that top-p alone needs. A draw is the argmax of probabilities over exponential
random numbers, without a wait for the host. Limit: the logits read once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cuda.timing import DEVICE, interleave, num_sets, working
from bench.harness import Report
from bench.roofs import Work

BATCH_SIZE, VOCAB_SIZE = 32, 128_256  # Llama 3
TOP_K, TOP_P = 50, 0.9


def draw(values: torch.Tensor, ids: torch.Tensor, top_p: float) -> torch.Tensor:
    """values: logits, largest first."""
    probs = torch.softmax(values, -1)
    probs = torch.where(probs.cumsum(-1) - probs > top_p, 0.0, probs)
    return ids.gather(1, (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True))


def torch_greedy(logits: torch.Tensor) -> torch.Tensor:
    return torch.argmax(logits, -1)


def torch_top_k(logits: torch.Tensor) -> torch.Tensor:
    return draw(*torch.topk(logits, TOP_K), 1.0)


def torch_top_p(logits: torch.Tensor) -> torch.Tensor:
    return draw(*torch.sort(logits, descending=True), TOP_P)


KINDS: dict[str, tuple[float, int, float, Callable]] = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0, torch_greedy),
    f"top-k {TOP_K}": (1.0, TOP_K, 1.0, torch_top_k),
    f"top-p {TOP_P}": (1.0, 0, TOP_P, torch_top_p),
}


def assert_allowed(logits: torch.Tensor, tokens: torch.Tensor, kind: str) -> None:
    """Every token is one that the filter leaves."""
    ids = tokens[:, None]
    larger = logits > logits.gather(1, ids)
    if kind == "greedy":
        assert not bool(larger.any())
    elif kind.startswith("top-k"):
        assert int(larger.sum(1).max()) < TOP_K
    else:
        mass_before = torch.where(larger, torch.softmax(logits.double(), -1), 0.0).sum(1)
        assert float(mass_before.max()) <= TOP_P + 1e-5
    assert bool((tokens >= 0).all())


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind: str, scale: float, report: Report) -> None:
    temperature, top_k, top_p, peer = KINDS[kind]
    num_bytes = 4 * BATCH_SIZE * VOCAB_SIZE
    sets = num_sets(num_bytes)
    logits = scale * torch.randn(sets, BATCH_SIZE, VOCAB_SIZE, device=DEVICE)

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((BATCH_SIZE,), value, dtype=dtype, device=DEVICE)

    rows = torch.arange(BATCH_SIZE, device=DEVICE)
    arguments = (
        full(temperature, torch.float32), full(top_k, torch.int32), full(top_p, torch.float32), full(0.0, torch.float32),
        rows, rows,
    )  # fmt: skip
    tokens, top_ids, top_logprobs = full(-1, torch.int64), rows.new_empty(BATCH_SIZE, 0), logits.new_empty(BATCH_SIZE, 0)

    def ours(i: int) -> None:
        torch.ops.tilestream.sample(logits[i], *arguments, *(None,) * 6, tokens, None, top_ids, top_logprobs)

    ours(0)
    assert_allowed(logits[0], tokens, kind)
    assert_allowed(logits[0], peer(logits[0]).flatten(), kind)
    times = interleave({"ours": ours} | working({"torch": lambda i: peer(logits[i])}), sets)
    case = f"{kind}, {BATCH_SIZE} x {VOCAB_SIZE}, logits of deviation {scale:g}"
    report.add("sample", case, times, work=Work(num_bytes, memory="copy"))
