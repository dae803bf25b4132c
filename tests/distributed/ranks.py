"""Ranks as processes of their own, spawned once and told what to run: functions of a module, by name."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tilestream._native import _C
from tilestream.distributed import Communicator, connect
from tilestream.placement import CPU

_LATEST_S = 120  # an answer of a rank


@dataclass
class Rank:
    """What a function that runs on a rank gets.

    Args:
        group: of torch.distributed, this rank in it.
        transport: see tilestream.distributed.connect.
        from_first: rank 0's messages arrive here; None on rank 0.
        to_others: on rank 0, where they are sent.
    """

    group: dist.ProcessGroup
    transport: str
    from_first: Connection | None = None
    to_others: list[Connection] = field(default_factory=list)
    communicators: list[Communicator] = field(default_factory=list)

    def send(self, message: Any) -> None:
        for connection in self.to_others:
            connection.send(message)

    def connect(self, num_bytes: int) -> Communicator:
        """Lives as long as the function runs."""
        self.communicators.append(connect(self.group, CPU, num_bytes=num_bytes, transport=self.transport))
        return self.communicators[-1]


class Ranks:
    """world_size processes; the first ones of them can form smaller groups.

    Args:
        world_size: how many.
        folder: for the file by which they find each other.
    """

    def __init__(self, world_size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe(duplex=False) for _ in range(world_size - 1)]
        orders = [context.Pipe() for _ in range(world_size)]
        readers = [None, *(reader for reader, _ in pairs)]
        self._orders = [ours for ours, _ in orders]
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, world_size, folder / "store", theirs, readers[rank], [w for _, w in pairs] if rank == 0 else []),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(orders)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable, *args: Any, world_size: int, transport: str) -> list[Any]:
        """What function(rank, *args) gives on each of the first world_size ranks."""
        for order in self._orders:  # all of them make the group
            order.send((function, args, world_size, transport))
        answers = []
        for rank, order in enumerate(self._orders):
            if not order.poll(_LATEST_S):
                raise TimeoutError(f"rank {rank} gives no answer")
            answers.append(order.recv())
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        return [answer for (answer,) in answers[:world_size]]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(
    rank: int, world_size: int, store: Path, orders: Connection, from_first: Connection | None, to_others: list[Connection]
) -> None:
    _C.set_num_threads(1)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    groups = {size: dist.new_group(list(range(size))) for size in range(2, world_size + 1)}
    while True:
        function, args, size, transport = orders.recv()
        answer: tuple | str = (None,)
        if rank < size:
            own = Rank(groups[size], transport, from_first, to_others[: size - 1])
            try:
                answer = (function(own, *args),)
            except Exception:
                answer = traceback.format_exc()
            for communicator in own.communicators:
                communicator.close()
        orders.send(answer)
