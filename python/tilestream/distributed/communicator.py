"""What the ranks of a tensor-parallel group do together."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from tilestream.distributed.collectives import Collectives
from tilestream.distributed.probe import UnavailableError
from tilestream.distributed.shared_memory import open_shared_memory
from tilestream.distributed.symmetric_memory import open_symmetric_memory
from tilestream.ops.quantise import QuantisedRows
from tilestream.placement import Placement

logger = logging.getLogger("tilestream.distributed")


class Communicator(Protocol):
    """A rank's way to the others. All ranks make the same calls in the same order with the same sizes.

    Args:
        rank: this process's number, from 0.
        world_size: how many ranks there are, 2 to 8.
        transport: "multimem", "peer", "shared memory", or the torch.distributed backend: "gloo", "nccl".
        replays: allreduce_rmsnorm is an op of ours, which programs and CUDA graphs record.
        shards_residual: a rank has the residual of its own tokens only (csrc/include/tilestream/allreduce.h: tokens_of);
            False: all of it, on every rank.
    """

    rank: int
    world_size: int
    transport: str
    replays: bool
    shards_residual: bool

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Memory that all ranks see, uninitialised; its offset is the same on each. Lives as long as the communicator.

        Args:
            num_bytes: how much; the same on every rank.
        Returns:
            [num_bytes] uint8 on the placement's device, 64-byte aligned.
        Raises:
            MemoryError: more than connect() was asked for; says how much is left.
        """
        ...

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        *,
        eps: float,
        int8: QuantisedRows | None = None,
        channel: int = 0,
    ) -> None:
        """x = norm(residual), residual += the sum of all ranks' x; summed in order of the ranks.

        Args:
            x: [num_tokens, hidden], contiguous; best in memory from empty(), else it is copied there and back. Overwritten
                by the result, or, where int8 is given, by anything.
            residual: as x; None: the norm of the sum itself.
            weight: [hidden], float32; None: x becomes the sum, and there is neither residual nor int8.
            eps: added to the mean square.
            int8: takes the result instead of x; its three tensors are in memory from empty(), too.
            channel: 0 or 1; calls on different streams that may run at the same time need different ones.
        Returns:
            None.
        Raises:
            RankDiedError: a rank has died or does not come; names it.
        """
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[world_size, *x.shape]: every rank's x, contiguous and small, of one shape and dtype everywhere."""
        ...

    def check(self) -> None:
        """Raises RankDiedError where a kernel found that a rank does not come. Costs a read of one word."""
        ...

    def close(self) -> None:
        """The end of all calls; the memory goes back with its last tensor. No other rank is waited for."""
        ...


def connect(
    group: ProcessGroup | None,
    placement: Placement,
    *,
    num_bytes: int,
    timeout_s: float = 30,
    transport: str = "auto",
) -> Communicator:
    """The best communicator that all ranks of `group` can have; called by all of them. One line of rank 0's log says which,
    and why not a better one.

    Args:
        group: of torch.distributed, with a backend for the CPU and one for the placement's device; None: all ranks.
        placement: where the model runs.
        num_bytes: symmetric memory of each rank for all of empty(), which rounds each up to 64.
        timeout_s: a rank that others wait for longer is taken for dead. (Collectives have the group's own.)
        transport: "auto", or the one that it must be: "multimem", "peer", "shared memory" or "collectives".
    Returns:
        The communicator.
    Raises:
        ValueError: transport is not one of these, or not one for the placement.
        UnavailableError: not all ranks can have that transport; the same text on all of them.
    """
    device = placement.device
    fused = ("shared memory",) if device.type == "cpu" else ("multimem", "peer")
    allowed = ("auto", *fused, "collectives")
    if transport not in allowed:
        raise ValueError(f"transport is {transport!r}; allowed on {device.type}: {', '.join(allowed)}")
    communicator: Communicator | None = None
    why = ""
    if transport != "collectives":
        try:
            if device.type == "cpu":
                communicator = open_shared_memory(group, num_bytes=num_bytes, timeout_s=timeout_s)
            else:
                communicator = open_symmetric_memory(group, device, transport, num_bytes=num_bytes, timeout_s=timeout_s)
        except UnavailableError as error:
            if transport != "auto":
                raise UnavailableError(f"the transport {transport} is not to be had: {error}") from None
            why = f"; not {' or '.join(fused)}: {error}"
    if communicator is None:
        communicator = Collectives(group, device)
    elif transport == "auto" and communicator.transport == "peer":
        why = "; not multimem: the GPUs have no multicast memory"
    if communicator.rank == 0:
        logger.info("%d ranks, joined by %s%s", communicator.world_size, communicator.transport, why)
    return communicator
