"""Who goes first: small pure functions over what waits, and the account of what each tenant was served.

Policies: "fcfs" runs requests in order of arrival, "priority" the lowest RequestOptions.priority first, "lpm" the one first
whose prompt has the longest prefix in the cache. Within each, the tenant that was served least goes before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tilestream.engine.request import Request

POLICIES = ("fcfs", "priority", "lpm")

LPM_WINDOW = 32  # requests from the front of a tenant's queue that "lpm" looks up in the prefix cache
LPM_MAX_PASSED = 64  # requests that may pass the one at the front before it goes first, whatever its prefix


def rank(policy: str, request: Request) -> tuple[int, int]:
    """Sorts requests of one tenant: the least is admitted first. Of those that run, the greatest is preempted first."""
    return (request.options.priority if policy == "priority" else 0, request.arrival_index)


def next_tenant(policy: str, heads: Mapping[str, Request], served_tokens: Mapping[str, int]) -> str:
    """The tenant whose turn it is.

    Args:
        heads: what waits first, by tenant; not empty.
        served_tokens: of each of them.
    """
    if len(heads) == 1:
        return next(iter(heads))

    def key(tenant: str) -> tuple[int, int, int]:
        priority, arrival_index = rank(policy, heads[tenant])
        return priority, served_tokens[tenant], arrival_index

    return min(heads, key=key)


def longest_prefix(waiting: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
    """Which of these has the longest prefix in the cache; the first of them, where several have."""
    lengths = [num_cached_tokens(request) for request in waiting]
    return lengths.index(max(lengths))


class ServiceAccount:
    """A virtual token counter per tenant (VTC: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).

    A tenant's counter is the tokens that were computed for it, prompts and answers alike; what comes from the prefix cache
    or is computed again after a preemption is free. A tenant whose queue was empty comes back with at least the least
    counter of those that wait: idle time gives no claim on the future.
    """

    def __init__(self) -> None:
        self.served_tokens: dict[str, int] = {}
        self._last_left = ""  # whose queue was the last to run empty

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Tokens were computed for a tenant that joined before."""
        self.served_tokens[tenant] += num_tokens

    def join(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant whose queue was empty has something in it; `waiting`: the others that wait."""
        counters = [self.served_tokens[other] for other in waiting]
        floor = min(counters) if counters else self.served_tokens.get(self._last_left, 0)
        self.served_tokens[tenant] = max(self.served_tokens.get(tenant, 0), floor)

    def leave(self, tenant: str) -> None:
        """A tenant's queue has run empty."""
        self._last_left = tenant
