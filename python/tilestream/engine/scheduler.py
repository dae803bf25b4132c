"""Which tokens run in the next step: iteration-level batching with stall-free chunked prefill.

Every step, under `token_budget` tokens (Sarathi-Serve, arXiv 2403.02310):
  1. each running request that is one token behind (a decode) gets that token;
  2. requests further behind (prefills in progress) get a chunk of what is left of the budget;
  3. waiting requests are admitted, in the policy's order, while budget, pages and max_num_seqs last.
So no decode ever waits for a prefill, and a long prompt costs the others one chunk's time per step.
With a target for the time between tokens, 2 and 3 also stop where the cost model says that the step
would take longer; one tile of prefill is computed in any case, so that prompts never starve.

Pages are taken as tokens are scheduled. When a decode finds none, the running request of the lowest priority
that arrived latest is preempted: its pages go back, it waits again with its output, and is recomputed
later (from the prefix cache, where its pages survived). A prefill takes pages from later prefills in the same way.
"""

from __future__ import annotations

from bisect import insort

from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.page_pool import PagePool
from tilestream.engine.prefix_cache import CacheNode, PrefixCache
from tilestream.engine.prefix_groups import PrefixGrouper, SharingCost
from tilestream.engine.request import Request, RequestState
from tilestream.engine.step_budget import StepBudget
from tilestream.engine.step_plan import ScheduledRequest, StepPlan
from tilestream.engine.waiting_queue import WaitingQueue


class Scheduler:
    """Owns the queues, the page pool and the prefix cache. O(running requests) per step.

    `running` is sorted by the policy's rank: prefills in progress go on in this order, and preemption takes the last.

    Args:
        config: the engine's limits.
        cost_model: what a step costs; needed with config.tbt_ms, and used with it alone.
    """

    def __init__(self, config: EngineConfig, cost_model: CostModel | None = None) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.cache = PrefixCache(self.pool, config.page_size)
        self.prefix_groups = PrefixGrouper(config.page_size, SharingCost())
        self.running: list[Request] = []
        self.waiting = WaitingQueue(config.policy, lambda request: len(self._match(request)))
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens
        self.prefix_cache_hits = 0  # tokens
        self.budget = StepBudget(config, cost_model)
        self._num_arrivals = 0

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a new request. Its tokens must fit the whole cache (the engine checks that)."""
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.add(request)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to do. Takes pages, but counts nothing as computed:
        that is launched()'s part."""
        plan = StepPlan()
        prefills = self._schedule_decodes(plan)
        num_reserved_pages = self._schedule_prefills(plan, prefills)
        self._admit(plan, num_reserved_pages)
        if not plan.scheduled:
            return None
        # A shared-prefix job cuts where the batch says, and without the cache no page is shared.
        if self.config.enable_prefix_caching and not self.config.batch_invariant:
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
        """The step has run: pages that its decodes filled can be shared, for their tokens are known now."""
        if not self.config.enable_prefix_caching:
            return
        page_size = self.config.page_size
        for item in plan.scheduled:
            request, end = item.request, item.start + item.num_new_tokens
            if end // page_size <= request.num_registered_pages:
                continue
            if request.state is RequestState.RUNNING and request.num_computed_tokens >= end:  # not preempted meanwhile
                self._share_pages(request, end)

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

    def _schedule_decodes(self, plan: StepPlan) -> list[Request]:
        """Returns the prefills in progress. Written out, with few calls: this runs for every request in every step."""
        page_size, served_tokens = self.config.page_size, self.waiting.service.served_tokens
        prefills: list[Request] = []
        index = num_keys = 0
        while index < len(self.running):  # preemption shortens it, always from the end
            request = self.running[index]
            index += 1
            start, num_tokens = request.num_computed_tokens, len(request.token_ids)
            if num_tokens - start > 1:
                prefills.append(request)
                continue
            if num_tokens >= request.max_num_tokens:
                continue  # the step that still runs draws its last token
            if start == len(request.pages) * page_size:
                while request.state is RequestState.RUNNING and self.pool.num_free_pages < 1:
                    self._preempt_latest()
                if request.state is not RequestState.RUNNING:
                    break  # it was the last
                request.pages += self.pool.allocate(1)
            served_tokens[request.options.tenant] += 1
            num_keys += start + 1
            plan.scheduled.append(ScheduledRequest(request, start, 1, True))
        plan.num_tokens = plan.num_samples = len(plan.scheduled)
        plan.num_decode_keys = num_keys
        return prefills

    def _schedule_prefills(self, plan: StepPlan, prefills: list[Request]) -> int:
        """Returns the pages that prompts in progress still need after this step."""
        num_reserved_pages = 0
        for request in prefills:
            if request.state is not RequestState.RUNNING:
                break  # preempted, as are all after it
            # A prefill takes pages from later prefills; a decode, which is scheduled already, keeps its own.
            while self._room_tokens(request) < 1 and self._latest_is_prefill_after(request):
                self._preempt_latest()
            chunk = self.budget.chunk_tokens(
                plan, request.num_computed_tokens, request.num_uncomputed_tokens, self._room_tokens(request)
            )
            if chunk > 0:
                self._take(plan, request, chunk)
            num_reserved_pages += self._num_pages_for(request.num_tokens) - len(request.pages)
        return num_reserved_pages

    def _admit(self, plan: StepPlan, num_reserved_pages: int) -> None:
        """Admit whose turn it is while everything fits, and stop at the first that does not: nobody slips past it.

        A request is admitted when its whole prompt fits beside what running prompts still need, and every
        running request could still grow by one page: otherwise it would soon be preempted again. So nobody comes back in
        the step that preempts them: they lack the very page that they were preempted for.
        """
        while (
            self.waiting
            and len(self.running) < self.config.max_running_requests
            and plan.num_tokens < self.config.token_budget
        ):
            request = self.waiting.first()
            if request.num_pending_tokens > 0:
                return  # preempted while a step still draws its newest token
            options, nodes = request.options, self._match(request)
            num_cached_tokens = len(nodes) * self.config.page_size
            num_uncomputed = request.num_tokens - num_cached_tokens
            chunk = self.budget.chunk_tokens(plan, num_cached_tokens, num_uncomputed, num_uncomputed)
            num_new_pages = self._num_pages_for(request.num_tokens) - len(nodes)
            num_wanted = num_new_pages + self.cache.num_unowned(nodes) + num_reserved_pages + len(self.running)
            if chunk == 0 or num_wanted > self.pool.num_free_pages:
                return
            self.waiting.admit(request)
            insort(self.running, request, key=self.waiting.rank)
            request.state = RequestState.RUNNING
            request.pages, request.cache_node = self.cache.acquire(nodes, options.prefix_salt, options.priority)
            request.num_registered_pages = len(nodes)
            request.num_computed_tokens = num_cached_tokens
            if request.num_cached_tokens is None:  # not when it comes back from a preemption
                request.num_cached_tokens = num_cached_tokens
                self.prefix_cache_queries += request.num_tokens if self.config.enable_prefix_caching else 0
                self.prefix_cache_hits += num_cached_tokens
            self._take(plan, request, chunk)
            num_reserved_pages += self._num_pages_for(request.num_tokens) - len(request.pages)

    def _match(self, request: Request) -> list[CacheNode]:
        """What the prefix cache holds of a request."""
        may_share = self.config.enable_prefix_caching and not request.lacks_prompt_logprobs
        return self.cache.match(request.token_ids, request.options.prefix_salt) if may_share else []

    def _share_pages(self, request: Request, end: int) -> None:
        """Let the prefix cache hand out the full pages of a request's first `end` tokens."""
        if not self.config.enable_prefix_caching:
            return
        page_size = self.config.page_size
        for index in range(request.num_registered_pages, end // page_size):
            tokens = request.token_ids[index * page_size : (index + 1) * page_size]
            node, page, priority = request.cache_node, request.pages[index], request.options.priority
            request.cache_node = self.cache.insert(node, tokens, page, priority)
            request.num_registered_pages += 1

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def _room_tokens(self, request: Request) -> int:
        """How many more tokens of a request could be computed with its own pages and all free ones."""
        num_pages = len(request.pages) + self.pool.num_free_pages
        return num_pages * self.config.page_size - request.num_computed_tokens

    def _take(self, plan: StepPlan, request: Request, num_new_tokens: int) -> None:
        """Compute these tokens of a prefill in this step. Whoever is scheduled after it, in this step too, may share the pages
        that they fill: a layer writes the keys and values of all its tokens before anybody attends to them."""
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_new_tokens
        num_missing = self._num_pages_for(end) - len(request.pages)
        if num_missing > 0:
            request.pages += self.pool.allocate(num_missing)
        self.waiting.service.charge(request.options.tenant, max(0, end - max(start, request.num_served_tokens)))
        plan.add(request, num_new_tokens)
        self._share_pages(request, min(end, request.num_known_tokens))

    def _latest_is_prefill_after(self, request: Request) -> bool:
        latest = self.running[-1]
        return latest is not request and latest.num_uncomputed_tokens > 1

    def _preempt_latest(self) -> None:
        request = self.running.pop()
        request.num_served_tokens = max(request.num_served_tokens, request.num_computed_tokens)
        self._release(request)
        request.state = RequestState.WAITING
        self.waiting.add(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        self.cache.drop(request.cache_node)
        request.pages = []
        request.cache_node = None
        request.num_computed_tokens = 0
