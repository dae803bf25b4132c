"""Two halves of a step on two streams: one half's communication runs under the other's computation.

    computation      attention(1)     attention(2)     MLP(1)           MLP(2)           attention(1) of the next layer ...
    communication    AR + norm(2)     AR + norm(1)     AR + norm(2)     AR + norm(1)     AR + norm(2) ...

Each stream runs in order, so the second half's attention comes after the first's and sees its keys; what else has to wait does so
by an event after each stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from tilestream._native import _C
from tilestream.distributed.weave import COMMUNICATION_BLOCKS

_ENDED = object()


class TwoStreams:
    """Takes turns with halves whose stages are communication, computation, communication, ..., communication.

    On a CPU both streams are the calling thread, and the order stays. On a GPU computation runs in the current stream, and
    communication in one of a higher priority, whose few blocks so get their SMs before the other half's tiles do. A CUDA graph
    may capture it: the second stream begins with an event of the current one, which waits for its end, and nothing is allocated.

    Kernels whose blocks stay leave the communication its SMs meanwhile (csrc/include/tilestream/taken_sms.h).

    Args:
        device: where the halves run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._communication: torch.cuda.Stream | None = None  # made when it is first needed

    def run(self, halves: Sequence[Iterator[None]]) -> None:
        """Run both halves, which end together, to their ends.

        Args:
            halves: each computes on next(), up to where the next stage begins.
        """
        if self._device.type == "cpu":
            self._take_turns(halves, [_Lane() for _ in halves])
            return
        _C.set_taken_sms(COMMUNICATION_BLOCKS)
        try:
            self._take_turns(halves, [_GpuLane(self._second_stream()) for _ in halves])
        finally:
            _C.set_taken_sms(0)

    def _take_turns(self, halves: Sequence[Iterator[None]], lanes: Sequence[_Lane | _GpuLane]) -> None:
        ended = False
        while not ended:
            for half, lane in zip(halves, lanes, strict=True):
                with lane.communication():
                    ended = next(half, _ENDED) is _ENDED
                if not ended:
                    with lane.computation():
                        next(half)
        for lane in lanes:
            lane.join()

    def _second_stream(self) -> torch.cuda.Stream:
        if self._communication is None:
            self._communication = torch.cuda.Stream(self._device, priority=-1)
        return self._communication


class _Lane:
    """Where a half's stages run on a CPU: here."""

    def communication(self) -> AbstractContextManager:
        return nullcontext()

    computation = communication

    def join(self) -> None:
        pass


class _GpuLane:
    """Where a half's stages run on a GPU, each after the one before it.

    Args:
        communication: the stream for it; computation runs in the current one.
    """

    def __init__(self, communication: torch.cuda.Stream) -> None:
        self._communicating, self._computing = communication, torch.cuda.current_stream(communication.device)
        self._before = torch.cuda.Event()  # of the last stage
        self._before.record(self._computing)

    def communication(self) -> AbstractContextManager:
        return self._stage(self._communicating)

    def computation(self) -> AbstractContextManager:
        return self._stage(self._computing)

    @contextmanager
    def _stage(self, stream: torch.cuda.Stream) -> Iterator[None]:
        stream.wait_event(self._before)
        with torch.cuda.stream(stream):
            yield
        self._before = torch.cuda.Event()
        self._before.record(stream)

    def join(self) -> None:
        self._computing.wait_event(self._before)
