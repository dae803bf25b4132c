"""Which unfinished requests are past their deadlines, at no cost in a step where none is."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from tilestream.engine.request import Request, RequestState


class Deadlines:
    """A heap of deadlines. It holds no request: those that finish in time leave only their ids until then."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []  # (deadline_s, arrival_index, request_id)

    def add(self, request: Request) -> None:
        """Note a request's deadline, if it has one."""
        if request.options.deadline_s is not None:
            heapq.heappush(self._heap, (request.options.deadline_s, request.arrival_index, request.request_id))

    def take_passed(self, now_s: float, unfinished: Mapping[str, Request]) -> list[Request]:
        """Those of the unfinished requests whose deadlines have passed; each is given once."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            _, arrival_index, request_id = heapq.heappop(self._heap)
            request = unfinished.get(request_id)
            if request is not None and request.arrival_index == arrival_index:  # not a later one of the same id
                passed.append(request)
        return passed


def deadline_text(request: Request) -> str:
    """What its reader is told."""
    waits = request.state is RequestState.WAITING
    when = "waited" if waits else f"ran, after {request.num_output_tokens} tokens"
    return f"the deadline of the request passed while it {when}"
