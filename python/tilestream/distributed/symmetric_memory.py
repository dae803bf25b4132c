"""Symmetric memory of ranks that are GPUs, by torch: through the NVLink switch, or as peers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, _symmetric_memory

from tilestream._native import _C
from tilestream.distributed.fused import Fused
from tilestream.distributed.probe import UnavailableError, agree, gather
from tilestream.ops.allreduce import SIGNAL_BYTES, rank_table


class SymmetricMemory(Fused):
    """See Communicator. Built by open_symmetric_memory().

    Args:
        transport: "multimem" or "peer".
        table: of ops.rank_table().
        block: this rank's block.
        handle: torch's, which keeps the others' blocks mapped.
        group: of the ranks.
    """

    def __init__(
        self, transport: str, table: torch.Tensor, block: torch.Tensor, handle: object, group: ProcessGroup | None
    ) -> None:
        super().__init__(transport, table, block)
        self._handle, self._group = handle, group
        self._fault_there = block[_C.fault_offset : _C.fault_offset + 4].view(torch.int32)
        self._fault_here = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._stream = torch.cuda.Stream(block.device)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.world_size, *x.shape)
        dist.all_gather_into_tensor(out, x, group=self._group)
        return out

    def close(self) -> None:
        """Waits for this GPU: what its kernels still reach must not go before them."""
        torch.cuda.synchronize(self._block.device)

    def _fault(self) -> int:
        """The word as it is now. Its stream is its own: no kernel is waited for."""
        with torch.cuda.stream(self._stream):
            self._fault_here.copy_(self._fault_there, non_blocking=True)
        self._stream.synchronize()
        return int(self._fault_here)


def open_symmetric_memory(
    group: ProcessGroup | None, device: torch.device, transport: str, *, num_bytes: int, timeout_s: float
) -> SymmetricMemory:
    """Called by all ranks.

    Args:
        group: of the ranks.
        device: this rank's GPU.
        transport: "multimem", "peer", or "auto": the first of these that there is.
        num_bytes, timeout_s: see connect().
    Returns:
        The communicator.
    Raises:
        UnavailableError: not all ranks can reach each other's memory; says which and why.
    """
    block_bytes = SIGNAL_BYTES + num_bytes
    reason = None
    try:
        block = _symmetric_memory.empty(block_bytes, dtype=torch.uint8, device=device)
        block[:SIGNAL_BYTES].zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch's for everything, no memory included
        reason = _first_line(error)
    agree(group, reason)
    try:
        handle = _symmetric_memory.rendezvous(block, group if group is not None else dist.group.WORLD)
    except RuntimeError as error:
        reason = _first_line(error)
    agree(group, reason)  # after it, everyone's signals are zero
    has_multicast = all(gather(group, handle.multicast_ptr != 0))
    if transport == "multimem" and not has_multicast:
        raise UnavailableError("the GPUs have no multicast memory: that needs NVSwitch and a driver that offers it")
    uses_multicast = has_multicast and transport != "peer"
    table = rank_table(
        handle.rank,
        handle.buffer_ptrs,
        block_bytes,
        timeout_s=timeout_s,
        multicast=handle.multicast_ptr if uses_multicast else 0,
    )
    return SymmetricMemory("multimem" if uses_multicast else "peer", table, block, handle, group)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
