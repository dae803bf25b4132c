"""The requests that wait: a sorted list per tenant, and whose turn it is."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import chain

from tilestream.engine.policies import (
    LPM_MAX_PASSED,
    LPM_WINDOW,
    ServiceAccount,
    longest_prefix,
    next_tenant,
    rank,
)
from tilestream.engine.request import Request


class WaitingQueue:
    """Requests by tenant, each tenant's in the order of the policy. What changes costs a binary search and a memmove.

    Args:
        policy: "fcfs", "priority" or "lpm".
        num_cached_tokens: how much of a request's prompt the prefix cache holds; asked under "lpm" alone.
    """

    def __init__(self, policy: str, num_cached_tokens: Callable[[Request], int]) -> None:
        self.policy = policy
        self.service = ServiceAccount()
        self.num_tokens = 0  # of all that wait
        self._num_cached_tokens = num_cached_tokens
        self._num_requests = 0
        self._queues: dict[str, list[Request]] = {}  # no empty ones
        self._num_passed: dict[str, int] = {}  # admissions, under "lpm", that went past who is at the front

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._queues.values())

    def add(self, request: Request) -> None:
        """Queue a request, new or preempted."""
        tenant = request.options.tenant
        queue = self._queues.get(tenant)
        if queue is None:
            self.service.join(tenant, self._queues)
            queue = self._queues[tenant] = []
        insort(queue, request, key=self.rank)
        self._num_requests += 1
        self.num_tokens += request.num_tokens

    def admit(self, request: Request) -> None:
        """Take out the one that first() gave."""
        tenant = request.options.tenant
        if request is not self._queues[tenant][0]:
            self._num_passed[tenant] = self._num_passed.get(tenant, 0) + 1
        self.remove(request)

    def remove(self, request: Request) -> None:
        """Take a queued request out."""
        tenant = request.options.tenant
        queue = self._queues[tenant]
        index = bisect_left(queue, self.rank(request), key=self.rank)
        if index == 0:
            self._num_passed.pop(tenant, None)
        del queue[index]
        if not queue:
            del self._queues[tenant]
            self.service.leave(tenant)
        self._num_requests -= 1
        self.num_tokens -= request.num_tokens

    def first(self) -> Request:
        """Whose turn it is; of a queue that is not empty. It stays in."""
        heads = {tenant: queue[0] for tenant, queue in self._queues.items()}
        tenant = next_tenant(self.policy, heads, self.service.served_tokens)
        queue = self._queues[tenant]
        if self.policy != "lpm" or len(queue) == 1 or self._num_passed.get(tenant, 0) >= LPM_MAX_PASSED:
            return queue[0]
        return queue[longest_prefix(queue[:LPM_WINDOW], self._num_cached_tokens)]

    def rank(self, request: Request) -> tuple[int, int]:
        """Where a request stands among its tenant's."""
        return rank(self.policy, request)
