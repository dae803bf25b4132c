"""Which blocks of 128 input channels get 4-bit activations: those whose rounding harms least per multiply-add."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tilestream.quantize.rounding import BLOCK_K, round_rows

Key = tuple[int, str]  # layer, name of INPUTS


@dataclass(slots=True)
class Input:
    """What the linears of one input have at stake.

    Attributes:
        k: channels.
        n: output features of all linears that read it.
        harm: [k // 128], what INT4 instead of INT8 adds to the mean square by which a token's log-likelihood moves, block
            by block.
    """

    k: int
    n: int
    harm: torch.Tensor


def block_harm(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Input.harm, summed over some rows instead of their mean; the errors of a row's channels count as independent.

    Args:
        rows: [num_rows, k] floats.
        gradient: [num_rows, k], of the log-likelihood by the rows.
    """
    full = rows.size(1) // BLOCK_K * BLOCK_K
    harm = [((round_rows(rows, k4) - rows) * gradient).square_().sum(0)[:full] for k4 in (full, 0)]
    return (harm[0] - harm[1]).unflatten(0, (-1, BLOCK_K)).sum(1)


def choose_k4(inputs: Mapping[Key, Input], share: float) -> dict[Key, int]:
    """k4 of every input, so that at least `share` of all multiply-adds meet INT4 activations, where blocks suffice.

    Blocks are taken from the front of each input, which is sorted so that outliers come last, the least harm per multiply-add
    first.
    """
    k4 = dict.fromkeys(inputs, 0)
    wanted = share * sum(i.k * i.n for i in inputs.values())
    queue = [(float(i.harm[0]) / i.n, key) for key, i in inputs.items() if len(i.harm)]
    heapq.heapify(queue)
    while wanted > 0 and queue:
        _, key = heapq.heappop(queue)
        k4[key] += BLOCK_K
        wanted -= BLOCK_K * inputs[key].n
        block = k4[key] // BLOCK_K
        if block < len(inputs[key].harm):
            heapq.heappush(queue, (float(inputs[key].harm[block]) / inputs[key].n, key))
    return k4


def int4_share(inputs: Mapping[Key, Input], k4: Mapping[Key, int]) -> float:
    """The share of multiply-adds that meet INT4 activations."""
    return sum(k4[key] * i.n for key, i in inputs.items()) / sum(i.k * i.n for i in inputs.values())
