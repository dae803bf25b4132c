"""What benches of two ranks share: processes with one thread each, on a CPU of its own, and the time of what they do together."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from tilestream.distributed import Communicator, connect
from tilestream.placement import CPU

SETTLE_S = 0.05
_ranks: list[Communicator] = []


def connected() -> Communicator:
    if not _ranks:
        _ranks.append(connect(None, CPU, num_bytes=64 << 20, transport="shared memory"))
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[_ranks[0].rank % len(cpus)]})  # of this thread; gloo's own stay free
    return _ranks[0]


def time_calls(prepare: Callable[[], object], run: Callable[[], object], num_calls: int) -> float:
    """Median seconds of a call, on this rank; the others run it at the same time."""
    meeting = connected().empty(16).view(torch.float32).view(1, 4)
    times = []
    for _ in range(num_calls + 3):
        prepare()
        connected().allreduce_rmsnorm(meeting, None, None, eps=1e-5)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])
