"""Rank processes for tests and benches: started once, they do what they are told."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from tilestream._native import _C

_TIMEOUT_S = 60


def _work(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (task := pipe.recv_bytes()) != b"":
        function, args = pickle.loads(task)
        try:
            answer = (function(rank, *args), None)
        except Exception as error:  # the test's to judge
            answer = (None, error)
        pipe.send_bytes(pickle.dumps(answer))


class Ranks:
    """Processes that have joined one gloo group.

    Args:
        world_size: how many.
        directory: for their store; a new one for each.
        order: in which they are started, with a pause between two; None: at once.
    """

    def __init__(self, world_size: int, directory: Path, order: Sequence[int] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list = [None] * world_size
        self._pipes: list = [None] * world_size
        for rank in order or range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, world_size, str(directory / "store"), there), daemon=True)
            process.start()
            there.close()  # so that its end closes the pipe
            self.processes[rank], self._pipes[rank] = process, here
            time.sleep(0.3 if order else 0)

    def begin(self, rank: int, function: Callable, *args: object) -> None:
        """function(rank, *args) on one rank: a function of a module."""
        self._pipes[rank].send_bytes(pickle.dumps((function, args)))

    def result(self, rank: int, timeout_s: float = _TIMEOUT_S) -> object:
        """Of what was begun; an exception there is raised here."""
        assert self._pipes[rank].poll(timeout_s), f"rank {rank} did not answer within {timeout_s} s"
        value, error = pickle.loads(self._pipes[rank].recv_bytes())
        if error is not None:
            raise error
        return value

    def call(self, function: Callable, *args: object) -> list:
        """function(rank, *args) on all ranks: their results."""
        for rank in range(len(self._pipes)):
            self.begin(rank, function, *args)
        return [self.result(rank) for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            with contextlib.suppress(BrokenPipeError):  # it was killed
                pipe.send_bytes(b"")
            process.join(_TIMEOUT_S)
