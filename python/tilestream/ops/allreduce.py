"""All-reduce over the ranks of a tensor-parallel group, with residual addition, RMS norm and quantisation fused in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilestream._native import _C
from tilestream.ops.quantise import QuantisedRows

SIGNAL_BYTES: int = _C.signal_bytes
"""With which every rank's block of symmetric memory begins; zero before the first call."""


def rank_table(
    rank: int, addresses: Sequence[int], block_bytes: int, *, timeout_s: float = 30, multicast: int = 0
) -> torch.Tensor:
    """What allreduce_rmsnorm knows of the ranks.

    Args:
        rank: this process's number.
        addresses: of every rank's block, as this process sees it; 1 to 8 of them.
        block_bytes: of one block, its first SIGNAL_BYTES included.
        timeout_s: a rank that others wait for longer is taken for dead.
        multicast: address of all blocks at once through the NVLink switch; 0: there is none.
    Returns:
        [5 + world_size] int64.
    Raises:
        nothing: the op checks it.
    """
    return torch.tensor([rank, len(addresses), multicast, round(1000 * timeout_s), block_bytes, *addresses])


def allreduce_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    ranks: torch.Tensor,
    *,
    eps: float = 1e-6,
    out: QuantisedRows | None = None,
    channel: int = 0,
) -> None:
    """residual += sum of all ranks' x; x, or out, = rms_norm(residual) on every rank. Called by all ranks, in the same order.

    Sums are in float, in order of the ranks. Token t belongs to rank t // ceil(num_tokens / world_size): of the residual a rank
    reads and writes its own tokens only.

    Args:
        x: [num_tokens, hidden], float32, float16 or bfloat16, contiguous, in this rank's block and at the same offset on all
            ranks, 16-byte aligned. Overwritten by the result, or by anything where there is an `out`.
        residual: as x, anywhere; None: the norm of the sum, which is then not rounded before it.
        weight: [hidden], float32; None: x becomes the sum, and there is neither residual nor out.
        ranks: of rank_table().
        eps: added to the mean square.
        out: takes the result as integers; in this rank's block, as x.
        channel: 0 or 1; calls that may run at the same time, on two streams, need different ones.
    Returns:
        None.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
        RuntimeError: a rank has died or does not come (on a GPU: the next Communicator.check() says so).
    """
    q, scale, sums = (None, None, None) if out is None else (out.q, out.scale, out.sum)
    torch.ops.tilestream.allreduce_rmsnorm(x, residual, weight, q, scale, sums, ranks, eps=eps, channel=channel)
