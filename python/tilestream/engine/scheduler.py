"""Which tokens run in the next step: iteration-level batching with stall-free chunked prefill.

Every step, under `token_budget` tokens (Sarathi-Serve, arXiv 2403.02310):
  1. each running request that is one token behind (a decode) gets that token;
  2. requests further behind (prefills in progress) get a chunk of what is left of the budget;
  3. waiting requests are admitted, first come first served, while budget, pages and max_num_seqs last.
So no decode ever waits for a prefill, and a long prompt costs the others one chunk's time per step.

Pages are taken as tokens are scheduled. When a decode finds none, the latest-arrived running request is
preempted: its pages go back, it returns to the front of the queue with its output, and is recomputed
later (from the prefix cache, where its pages survived).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tilestream.engine.config import EngineConfig
from tilestream.engine.page_pool import PagePool
from tilestream.engine.prefix_cache import PrefixCache
from tilestream.engine.prefix_groups import PrefixGroup, PrefixGrouper, SharingCost
from tilestream.engine.request import Request, RequestState

# A prefill chunk that a limit cuts ends where the step's tokens fill whole tiles of this many rows, since a
# partial tile costs as much as a full one (257 tokens cost 32% more than 256: Sarathi-Serve, arXiv 2403.02310).
TILE_TOKENS = 32


@dataclass(slots=True)
class ScheduledRequest:
    """Tokens [start, start + num_new_tokens) of `request` run in this step; its pages cover them."""

    request: Request
    start: int  # tokens computed before this step
    num_new_tokens: int
    samples: bool  # the last of them is the request's newest token: its logits are sampled


@dataclass(slots=True)
class StepPlan:
    """One step, as data: decodes first, then prefill chunks, each in order of arrival.

    prefix_groups: (prefix_tokens, indices into scheduled) of requests that hold the same leading pages.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    prefix_groups: list[PrefixGroup] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def num_samples(self) -> int:
        return sum(item.samples for item in self.scheduled)

    def add(self, request: Request, num_new_tokens: int) -> None:
        start = request.num_computed_tokens
        samples = start + num_new_tokens == request.num_tokens
        self.scheduled.append(ScheduledRequest(request, start, num_new_tokens, samples))
        self.num_tokens += num_new_tokens


@dataclass(slots=True)
class SampledTokens:
    """What the runner gives back for a StepPlan: one row per item with `samples`, in plan order.

    token_ids: the drawn tokens; -1: the row's logits hold a NaN, or nothing finite to draw from.
    logprobs: of the drawn tokens, natural log of the model's own probabilities.
    top_ids, top_logprobs: per row, most likely first, at least as many as its request's params.logprobs.
    None when no request of the step asked for logprobs.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None


class Scheduler:
    """Owns the queues, the page pool and the prefix cache. O(running requests) per step.

    `running` followed by `waiting` is always in order of arrival: admission takes from the front of
    `waiting`, preemption gives the end of `running` back to it.

    Args:
        config: the engine's limits.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.cache = PrefixCache(self.pool, config.page_size)
        self.prefix_groups = PrefixGrouper(config.page_size, SharingCost())
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens
        self.prefix_cache_hits = 0  # tokens

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a new request. Its tokens must fit the whole cache (the engine checks that)."""
        self.waiting.append(request)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to do. Takes pages, but counts nothing as computed:
        that is launched()'s part."""
        plan = StepPlan()
        self._schedule_decodes(plan)
        num_reserved_pages = self._schedule_prefills(plan)
        self._admit(plan, num_reserved_pages)
        if not plan.scheduled:
            return None
        if not self.config.batch_invariant:  # a shared-prefix job cuts where the batch says
            plan.prefix_groups = self.prefix_groups.find(
                [item.request.pages for item in plan.scheduled],
                [item.num_new_tokens for item in plan.scheduled],
                [item.start for item in plan.scheduled],
            )
        return plan

    def launched(self, plan: StepPlan) -> None:
        """The step is on its way: what it computes is there for every step after it, and the tokens that it draws have
        their places."""
        row = 0
        for item in plan.scheduled:
            request = item.request
            request.num_computed_tokens += item.num_new_tokens
            if item.samples:
                request.token_ids.append(-1 - row)
                request.num_pending_tokens += 1
                row += 1

    def complete(self, plan: StepPlan) -> None:
        """The step has run: pages that it filled can be shared."""
        if not self.config.enable_prefix_caching:
            return
        page_size = self.config.page_size
        for item in plan.scheduled:
            request, end = item.request, item.start + item.num_new_tokens
            if request.state is not RequestState.RUNNING or request.num_computed_tokens < end:
                continue  # finished or preempted while the step ran
            for index in range(request.num_registered_pages, end // page_size):
                tokens = request.token_ids[index * page_size : (index + 1) * page_size]
                node, page, priority = request.cache_node, request.pages[index], request.options.priority
                request.cache_node = self.cache.insert(node, tokens, page, priority)
                request.num_registered_pages += 1

    def finish(self, request: Request, *, forget_pages: bool = False) -> None:
        """Take a request out, whatever its state, and free its pages.

        Args:
            forget_pages: its KV is suspect: the prefix cache must not hand any of it to anyone.
        """
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            if forget_pages:
                self.cache.forget(request.pages)
            self._release(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED

    def check_invariants(self) -> None:
        """Check page ownership and the requests' counts. O(pages); for tests.

        Raises:
            RuntimeError: what is wrong.
        """
        self.pool.check_invariants(request.pages for request in self.running)
        for request in self.running:
            if len(request.pages) * self.config.page_size < request.num_computed_tokens:
                raise RuntimeError(f"{request.request_id} has more KV than its {len(request.pages)} pages hold")
        for request in self.waiting:
            if request.pages or request.num_computed_tokens or request.cache_node is not None:
                raise RuntimeError(f"{request.request_id} waits, but holds pages {request.pages}")

    def _schedule_decodes(self, plan: StepPlan) -> None:
        index = 0
        while index < len(self.running):  # preemption shortens it, always from the end
            request = self.running[index]
            index += 1
            if request.num_uncomputed_tokens > 1 or request.num_tokens >= request.max_num_tokens:
                continue  # a prefill; or the step that still runs draws its last token
            while request.state is RequestState.RUNNING and self._room_tokens(request) < 1:
                self._preempt_latest()
            if request.state is RequestState.RUNNING:
                self._take(plan, request, 1)

    def _schedule_prefills(self, plan: StepPlan) -> int:
        """Returns the pages that prompts in progress still need after this step."""
        num_reserved_pages = 0
        index = 0
        while index < len(self.running):
            request = self.running[index]
            index += 1
            if request.num_uncomputed_tokens <= 1:
                continue
            # A prefill takes pages from later prefills; a decode, which is scheduled already, keeps its own.
            while self._room_tokens(request) < 1 and self._latest_is_prefill_after(request):
                self._preempt_latest()
            chunk = self._chunk_tokens(plan, request.num_uncomputed_tokens, self._room_tokens(request))
            if chunk > 0:
                self._take(plan, request, chunk)
            num_reserved_pages += self._num_pages_for(request.num_tokens) - len(request.pages)
        return num_reserved_pages

    def _admit(self, plan: StepPlan, num_reserved_pages: int) -> None:
        """Admit from the front of the queue while everything fits, and stop at the first that does not.

        A request is admitted when its whole prompt fits beside what running prompts still need, and every
        running request could still grow by one page: otherwise it would soon be preempted again. So nothing is
        admitted in a step that preempts: the front of the queue lacks the very page it was preempted for.
        """
        while (
            self.waiting
            and len(self.running) < self.config.max_running_requests
            and plan.num_tokens < self.config.token_budget
        ):
            request = self.waiting[0]
            if request.num_pending_tokens > 0:
                return  # preempted while a step still draws its newest token
            options = request.options
            may_share = self.config.enable_prefix_caching
            nodes = self.cache.match(request.token_ids, options.prefix_salt) if may_share else []
            num_new_pages = self._num_pages_for(request.num_tokens) - len(nodes)
            num_wanted = num_new_pages + self.cache.num_unowned(nodes) + num_reserved_pages + len(self.running)
            num_cached_tokens = len(nodes) * self.config.page_size
            if num_wanted > self.pool.num_free_pages:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.state = RequestState.RUNNING
            request.pages, request.cache_node = self.cache.acquire(nodes, options.prefix_salt, options.priority)
            request.num_registered_pages = len(nodes)
            request.num_computed_tokens = num_cached_tokens
            if request.num_cached_tokens is None:  # not when it comes back from a preemption
                request.num_cached_tokens = num_cached_tokens
                self.prefix_cache_queries += request.num_tokens if self.config.enable_prefix_caching else 0
                self.prefix_cache_hits += num_cached_tokens
            num_uncomputed = request.num_uncomputed_tokens
            self._take(plan, request, self._chunk_tokens(plan, num_uncomputed, num_uncomputed))
            num_reserved_pages += self._num_pages_for(request.num_tokens) - len(request.pages)

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _room_tokens(self, request: Request) -> int:
        """How many more tokens of a request could be computed with its own pages and all free ones."""
        num_pages = len(request.pages) + self.pool.num_free_pages
        return num_pages * self.config.page_size - request.num_computed_tokens

    def _chunk_tokens(self, plan: StepPlan, num_uncomputed: int, room_tokens: int) -> int:
        """Tokens of a prefill that run in this step: all, or what is left, cut back to a whole tile if it
        reaches one."""
        most = min(self.config.token_budget - plan.num_tokens, room_tokens)
        if num_uncomputed <= most:
            return num_uncomputed
        to_tile_border = (plan.num_tokens + most) // TILE_TOKENS * TILE_TOKENS - plan.num_tokens
        return max(0, to_tile_border if to_tile_border > 0 else most)

    def _take(self, plan: StepPlan, request: Request, num_new_tokens: int) -> None:
        num_missing = self._num_pages_for(request.num_computed_tokens + num_new_tokens) - len(request.pages)
        if num_missing > 0:
            request.pages += self.pool.allocate(num_missing)
        plan.add(request, num_new_tokens)

    def _latest_is_prefill_after(self, request: Request) -> bool:
        latest = self.running[-1]
        return latest is not request and latest.num_uncomputed_tokens > 1

    def _preempt_latest(self) -> None:
        request = self.running.pop()
        self._release(request)
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        self.cache.drop(request.cache_node)
        request.pages = []
        request.cache_node = None
        request.num_computed_tokens = 0
