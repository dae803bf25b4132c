"""Symmetric memory of ranks that are processes of one machine: all map one file that has no name."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tilestream._native import _C
from tilestream.distributed.fused import Fused
from tilestream.distributed.probe import Member, UnavailableError, agree, gather
from tilestream.ops.allreduce import SIGNAL_BYTES, rank_table

_GATHER_BYTES = 64 << 10  # of one rank in all_gather(), at a time
_EPS = 1.0  # of a call without a norm: not used


def _word(block: torch.Tensor, offset: int) -> torch.Tensor:
    return block[offset : offset + 4].view(torch.int32)


class SharedMemory(Fused):
    """See Communicator. Built by open_shared_memory().

    Args:
        rank: this process's number.
        blocks: [world_size, block bytes], uint8, every rank's block; zero at first.
        timeout_s: see connect().
    """

    def __init__(self, rank: int, blocks: torch.Tensor, timeout_s: float) -> None:
        world_size, block_bytes = blocks.shape
        addresses = [block.data_ptr() for block in blocks]
        super().__init__("shared memory", rank_table(rank, addresses, block_bytes, timeout_s=timeout_s), blocks[rank])
        self._faults = _word(blocks[0], _C.fault_offset)
        self._meeting = self.empty(16).view(torch.float32).view(1, 4)
        begin = self.empty(2 * _GATHER_BYTES).data_ptr() - self._begin
        halves = blocks[:, begin : begin + 2 * _GATHER_BYTES].unflatten(1, (2, _GATHER_BYTES))
        self._half, self._other_half = halves.unbind(1)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.world_size, *x.shape)
        if x.numel() == 0:
            return out
        mine, every = x.reshape(-1).view(torch.uint8), out.view(self.world_size, -1).view(torch.uint8)
        for begin in range(0, mine.numel(), _GATHER_BYTES):
            part = mine[begin : begin + _GATHER_BYTES]
            num_bytes = part.numel()
            self._half[self.rank, :num_bytes] = part
            self._launch(self._meeting, None, None, _EPS, None, 0)  # nobody returns before all have come
            every[:, begin : begin + num_bytes] = self._half[:, :num_bytes]
            # Who writes this half again has met all others in between, who have read it by then.
            self._half, self._other_half = self._other_half, self._half
        return out

    def close(self) -> None:
        """There is nothing to do: the system takes the memory back with the last process's last tensor of it."""

    def _fault(self) -> int:
        return int(self._faults)


def open_shared_memory(group: ProcessGroup | None, *, num_bytes: int, timeout_s: float) -> SharedMemory:
    """Called by all ranks.

    Args:
        group: of the ranks.
        num_bytes, timeout_s: see connect().
    Returns:
        The communicator.
    Raises:
        UnavailableError: not all ranks can map the same memory; says which and why.
    """
    members = gather(group, Member.this())
    strangers = [rank for rank, member in enumerate(members) if member.host != members[0].host]
    if strangers:
        names = f"rank 0 is on {members[0].name}, rank {strangers[0]} on {members[strangers[0]].name}"
        raise UnavailableError(f"{names}, or in another container")
    rank = dist.get_rank(group)
    page = mmap.PAGESIZE
    block_bytes = -(-(SIGNAL_BYTES + num_bytes + 2 * _GATHER_BYTES + page) // page) * page
    try:
        blocks = _map(group, rank, len(members), block_bytes, _anonymous_file)
    except UnavailableError as first:
        try:
            blocks = _map(group, rank, len(members), block_bytes, _named_file)
        except UnavailableError as second:
            raise UnavailableError(f"{first}; {second}") from None
    _word(blocks[rank], _C.pid_offset).fill_(os.getpid())
    agree(group, None)  # everyone's number is there before the first call
    return SharedMemory(rank, blocks, timeout_s)


def _anonymous_file() -> tuple[int, str]:
    descriptor = os.memfd_create("tilestream")
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _named_file() -> tuple[int, str]:
    """For where a process may not look into another's /proc; its name is gone as soon as all ranks have opened it."""
    return tempfile.mkstemp(prefix="tilestream-", dir="/dev/shm")


def _map(
    group: ProcessGroup | None, rank: int, world_size: int, block_bytes: int, create: Callable[[], tuple[int, str]]
) -> torch.Tensor:
    """[world_size, block_bytes] of zeros in a file of rank 0, or UnavailableError on all ranks."""
    descriptor, path, reason = -1, "", None
    try:
        if rank == 0:
            descriptor, path = create()
            os.ftruncate(descriptor, world_size * block_bytes)
    except OSError as error:
        reason = str(error)
    try:
        identity = os.fstat(descriptor)[1:3] if reason is None and rank == 0 else None
        path, identity = gather(group, (path, identity))[0]
        agree(group, reason)
        try:
            if rank != 0:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(descriptor)[1:3] != identity:
                reason = f"{path} is another file here"
            else:
                # Reserved now, and by the rank that uses it most: later a full memory would be a signal, not an error.
                os.posix_fallocate(descriptor, rank * block_bytes, block_bytes)
                memory = mmap.mmap(descriptor, world_size * block_bytes)
        except (OSError, ValueError) as error:
            reason = str(error)
        agree(group, reason)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if rank == 0 and create is _named_file and path:
            os.unlink(path)
    return torch.frombuffer(memory, dtype=torch.uint8).view(world_size, block_bytes)
