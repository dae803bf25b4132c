"""A communicator on memory that all ranks see: one kernel reduces, adds, norms, and gives everyone the result."""

from __future__ import annotations

import torch

from tilestream._native import _C
from tilestream.engine.errors import RankDiedError
from tilestream.ops.allreduce import SIGNAL_BYTES, allreduce_rmsnorm
from tilestream.ops.quantise import QuantisedRows

_ALIGNMENT = 64


class Fused:
    """See Communicator; what the transports with symmetric memory share.

    Args:
        transport: its name.
        table: of ops.rank_table().
        block: this rank's block, uint8, its signals included.
    """

    replays = True
    shards_residual = True

    def __init__(self, transport: str, table: torch.Tensor, block: torch.Tensor) -> None:
        self.transport = transport
        self.rank, self.world_size, _, self._timeout_ms = table[:4].tolist()
        self._table, self._block, self._free = table, block, block[SIGNAL_BYTES:]
        self._begin, self._end = block.data_ptr(), block.data_ptr() + block.numel()
        self._staging = [block[:0], block[:0]]  # of each channel

    def empty(self, num_bytes: int) -> torch.Tensor:
        rounded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if rounded > self._free.numel():
            raise MemoryError(
                f"{num_bytes} bytes of symmetric memory are asked for, but {self._free.numel()} of "
                f"{self._block.numel() - SIGNAL_BYTES} are left; connect() was given too few num_bytes"
            )
        found, self._free = self._free[:num_bytes], self._free[rounded:]
        return found

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
        if self._begin <= x.data_ptr() < self._end:
            return self._launch(x, residual, weight, eps, int8, channel)
        if x.nbytes > self._staging[channel].numel():
            self._staging[channel] = self.empty(x.nbytes)
        staged = self._staging[channel][: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self._launch(staged, residual, weight, eps, int8, channel)
        x.copy_(staged)

    def _launch(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        int8: QuantisedRows | None,
        channel: int,
    ) -> None:
        try:
            allreduce_rmsnorm(x, residual, weight, self._table, eps=eps, out=int8, channel=channel)
        except RuntimeError:
            self.check()
            raise

    def check(self) -> None:
        fault = self._fault()
        if fault != 0:
            raise RankDiedError(_C.fault_text(fault, self.world_size, self._timeout_ms))

    def _fault(self) -> int:
        raise NotImplementedError
