"""Which unfinished requests are past their deadlines, at no cost in a step where none is."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from tilestream.engine.request import Request, RequestState

_Entry = tuple[float, int, str]  # (deadline_s, arrival_index, request_id)


class Deadlines:
    """A heap of deadlines. It holds no request: those that finish in time leave only their ids, and these are swept out
    when they are the most.

    Args:
        unfinished: the engine's requests by id, at any time.
    """

    def __init__(self, unfinished: Mapping[str, Request]) -> None:
        self._unfinished = unfinished
        self._heap: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Note a request's deadline, if it has one."""
        if request.options.deadline_s is None:
            return
        if len(self._heap) > 2 * len(self._unfinished) + 64:
            self._heap = [entry for entry in self._heap if self._request_of(entry) is not None]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.options.deadline_s, request.arrival_index, request.request_id))

    def take_passed(self, now_s: float) -> list[Request]:
        """Those of the unfinished requests whose deadlines have passed; each is given once."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            request = self._request_of(heapq.heappop(self._heap))
            if request is not None:
                passed.append(request)
        return passed

    def _request_of(self, entry: _Entry) -> Request | None:
        _, arrival_index, request_id = entry
        request = self._unfinished.get(request_id)
        # A later one may have the same id.
        return request if request is not None and request.arrival_index == arrival_index else None


def deadline_text(request: Request) -> str:
    """What its reader is told."""
    waits = request.state is RequestState.WAITING
    when = "waited" if waits else f"ran, after {request.num_output_tokens} tokens"
    return f"the deadline of the request passed while it {when}"
