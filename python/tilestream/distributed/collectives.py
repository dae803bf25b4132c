"""The communicator that works everywhere: torch.distributed's all-reduce, then our norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tilestream import _native  # noqa: F401  (registers torch.ops.tilestream)
from tilestream.distributed.probe import Member, gather
from tilestream.engine.errors import RankDiedError
from tilestream.ops.quantise import QuantisedRows

_ENDING_MS = 100  # from a process's closing of its sockets to its end


class Collectives:
    """See Communicator. The residual is whole on every rank, and memory is ordinary memory.

    Args:
        group: of torch.distributed; None: all ranks.
        device: of the tensors.
    """

    replays = False
    shards_residual = False

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        self.transport = backends[device.type]
        self._group, self._device = group, device
        self._members = gather(group, Member.this())
        self._ops = torch.ops.tilestream

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

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
        with self._naming_the_dead():
            dist.all_reduce(x, group=self._group)
        if weight is None:
            return
        if residual is None:
            self._ops.rms_norm(x, weight, x, eps=eps)
            if int8 is not None:
                self._ops.quantise(x, int8.q, int8.scale, int8.sum)
        elif int8 is None:
            self._ops.fused_add_rms_norm(x, residual, weight, eps=eps)
        else:
            self._ops.fused_add_rms_norm_quant(x, residual, weight, int8.q, int8.scale, int8.sum, eps=eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.world_size, *x.shape)
        with self._naming_the_dead():
            dist.all_gather(list(out.unbind()), x, group=self._group)
        return out

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankDiedError(f"{self._the_dead()} ({self.transport}: {error})") from error

    def _the_dead(self) -> str:
        """Of another machine nobody here can say whether a process has ended."""
        for rank, member in enumerate(self._members):
            if rank != self.rank and member.host == self._members[self.rank].host and member.ends_within(_ENDING_MS):
                return f"rank {rank} of {self.world_size} has died: its process has ended"
        return f"rank {self.rank} of {self.world_size} lost another rank, or waited too long for it"
