"""Replays a trace in virtual time through the engine's own Scheduler: the clock is the cost model, and nothing is computed.

A replica is a Scheduler of its own, and arrivals are routed to one of many. What is missing beside a real engine is its own
Python, the network and whatever the cost model does not know; a request's output length is the trace's.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tilestream.engine.admission import QueueLimits
from tilestream.engine.config import EngineConfig
from tilestream.engine.cost_model import CostModel
from tilestream.engine.detokenizer import Detokenizer
from tilestream.engine.errors import QueueFullError
from tilestream.engine.request import Request, RequestOptions
from tilestream.engine.scheduler import Scheduler
from tilestream.engine.step_plan import StepPlan
from tilestream.engine.workload import TraceRequest
from tilestream.sampling_params import SamplingParams

ROUTES = ("round-robin", "least-loaded", "prefix-affinity")

# Under "prefix-affinity" a replica keeps its prefixes while it has no more than so many times the mean load.
_AFFINITY_MOST_LOAD = 1.5


class _NoText:
    """A tokenizer that nobody asks: no token of a simulation is read."""

    def token_bytes(self, token_id: int) -> bytes:
        return b""


_PARAMS, _DETOKENIZER = SamplingParams(), Detokenizer(_NoText())


@dataclass(eq=False, slots=True)
class SimulatedRequest(Request):
    """A request, and when it got what. Seconds since the first arrival."""

    last_token_s: float = 0.0
    replica: int = 0


@dataclass(slots=True)
class Simulation:
    """What a simulation gave.

    Args:
        finished: all answered requests; refused: how many the queue limits or the KV cache's size turned away.
        gaps_s: times between two tokens of a request, with how many tokens each stands for.
        timeline: per slot of slot_s: busy seconds of all replicas, and integrals over them: requests running, requests
            waiting, and sums: decode tokens, prefill tokens.
        seconds: virtual; wall_s: what replaying them took.
    """

    num_replicas: int
    slot_s: float
    finished: list[SimulatedRequest] = field(default_factory=list)
    refused: int = 0
    gaps_s: list[tuple[float, int]] = field(default_factory=list)
    timeline: dict[int, list[float]] = field(default_factory=dict)
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    seconds: float = 0.0
    wall_s: float = 0.0


class Replica:
    """One engine's scheduler, with a step that is on its way until now_s.

    Args:
        result: where it writes what it did; shared by all replicas.
    """

    def __init__(self, index: int, config: EngineConfig, cost_model: CostModel, result: Simulation) -> None:
        self.index = index
        self.scheduler = Scheduler(config, cost_model)
        self._queue_limits = QueueLimits(config)
        self.num_unfinished = 0
        self.now_s = 0.0
        self._cost_model = cost_model
        self._result = result
        self._plan: StepPlan | None = None
        self._begin_s = 0.0

    def has_room(self, request: Request) -> bool:
        """Whether its queue takes one more request."""
        waiting = self.scheduler.waiting
        try:
            self._queue_limits.check(request.num_prompt_tokens, len(waiting), waiting.num_tokens)
        except QueueFullError:
            return False
        return True

    def begin_step(self, now_s: float) -> bool:
        """Start the next step; False if there is nothing to do."""
        plan = self.scheduler.schedule()
        self._plan = plan
        if plan is None:
            return False
        self.scheduler.launched(plan)
        step_s = self._cost_model.step_s(plan)
        self._begin_s, self.now_s = now_s, now_s + step_s
        self._count(plan, step_s)
        return True

    def end_step(self) -> None:
        """Hand out the step's tokens."""
        plan, begin_s, now_s = self._plan, self._begin_s, self.now_s
        self.scheduler.complete(plan)
        num_steady = 0  # tokens of requests that got one in the step before, too
        for item in plan.scheduled:
            if not item.samples:
                continue
            request = item.request
            request.token_ids[-1] = 0
            request.num_pending_tokens = 0
            if request.first_token_s is None:
                request.first_token_s = now_s
            elif request.last_token_s == begin_s:
                num_steady += 1
            else:
                self._result.gaps_s.append((now_s - request.last_token_s, 1))
            request.last_token_s = now_s
            if len(request.token_ids) == request.max_num_tokens:
                self.scheduler.finish(request)
                self.num_unfinished -= 1
                request.token_ids = []  # its counts stay
                self._result.finished.append(request)
        if num_steady:
            self._result.gaps_s.append((now_s - begin_s, num_steady))

    def _count(self, plan: StepPlan, step_s: float) -> None:
        self._result.num_steps += 1
        slot = self._result.timeline.setdefault(int(self._begin_s / self._result.slot_s), [0.0] * 5)
        num_decodes = plan.num_tokens - plan.num_prefill_tokens
        slot[0] += step_s
        slot[1] += step_s * len(self.scheduler.running)
        slot[2] += step_s * len(self.scheduler.waiting)
        slot[3] += num_decodes
        slot[4] += plan.num_prefill_tokens


def simulate(
    trace: Sequence[TraceRequest],
    config: EngineConfig,
    cost_model: CostModel,
    *,
    num_replicas: int = 1,
    route: str = "least-loaded",
) -> Simulation:
    """Replay a trace.

    Args:
        trace: in order of arrival, at least one request.
        config: of each replica.
        cost_model: of each replica.
        route: who gets a request: "round-robin", "least-loaded" (fewest unfinished requests), or "prefix-affinity": the
            replica that its prefix was first sent to, while that has no more than 1.5 times the mean load.
    Raises:
        ValueError: a route that is not there.
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
    begin_s = time.perf_counter()
    result = Simulation(num_replicas, slot_s=max(trace[-1].arrival_s, 1e-3) / 240)
    replicas = [Replica(index, config, cost_model, result) for index in range(num_replicas)]
    choose = _router(route, replicas)
    steps: list[tuple[float, int]] = []  # a heap: when a replica's step ends
    for index, item in enumerate(trace):
        _run_until(item.arrival_s, steps, replicas)
        replica = replicas[choose(index, item)]
        request = _new_request(index, item, replica.index, config)
        if request is None or not replica.has_room(request):
            result.refused += 1
            continue
        was_idle = replica.num_unfinished == 0
        replica.num_unfinished += 1
        replica.scheduler.add(request)
        if was_idle and replica.begin_step(item.arrival_s):
            heapq.heappush(steps, (replica.now_s, replica.index))
    _run_until(math.inf, steps, replicas)
    for replica in replicas:
        result.num_preemptions += replica.scheduler.num_preemptions
        result.prefix_cache_queries += replica.scheduler.prefix_cache_queries
        result.prefix_cache_hits += replica.scheduler.prefix_cache_hits
        result.seconds = max(result.seconds, replica.now_s)
    result.wall_s = time.perf_counter() - begin_s
    return result


def _run_until(until_s: float, steps: list[tuple[float, int]], replicas: list[Replica]) -> None:
    """Run all steps that end before until_s, and start those after them."""
    while steps and steps[0][0] <= until_s:
        now_s, index = steps[0]
        replica = replicas[index]
        replica.end_step()
        if replica.begin_step(now_s):
            heapq.heapreplace(steps, (replica.now_s, index))
        else:
            heapq.heappop(steps)


def _router(route: str, replicas: list[Replica]) -> Callable[[int, TraceRequest], int]:
    homes: dict[str, int] = {}

    def least_loaded(index: int, item: TraceRequest) -> int:
        return min(replicas, key=lambda replica: replica.num_unfinished).index

    def prefix_affinity(index: int, item: TraceRequest) -> int:
        home = homes.get(item.prefix_id) if item.prefix_id else None
        mean = sum(replica.num_unfinished for replica in replicas) / len(replicas)
        if home is None or replicas[home].num_unfinished > _AFFINITY_MOST_LOAD * mean + 1:
            home = homes[item.prefix_id] = least_loaded(index, item)
        return home

    def round_robin(index: int, item: TraceRequest) -> int:
        return index % len(replicas)

    return {"round-robin": round_robin, "least-loaded": least_loaded, "prefix-affinity": prefix_affinity}[route]


def _new_request(index: int, item: TraceRequest, replica: int, config: EngineConfig) -> SimulatedRequest | None:
    """None: it does not fit."""
    num_tokens = item.prompt_tokens + item.output_tokens
    if item.prompt_tokens >= config.max_model_len or num_tokens > config.capacity_tokens + 1:
        return None
    token_ids = [0] * item.prompt_tokens
    if config.enable_prefix_caching:  # tokens differ by prefix, and behind it by request
        shared = item.prefix_tokens if item.prefix_id else 0
        token_ids[:shared] = [hash(item.prefix_id)] * shared
        token_ids[shared:] = [index] * (item.prompt_tokens - shared)
    return SimulatedRequest(
        request_id=str(index),
        token_ids=token_ids,
        num_prompt_tokens=item.prompt_tokens,
        params=_PARAMS,
        seed=0,
        detokenizer=_DETOKENIZER,
        arrival_s=item.arrival_s,
        max_num_tokens=min(num_tokens, config.max_model_len),
        options=RequestOptions(priority=item.priority, tenant=item.tenant),
        replica=replica,
    )
