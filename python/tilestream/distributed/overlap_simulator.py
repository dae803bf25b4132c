"""The two-stream schedule of a split step in virtual time: which tokens and which cut gain what. Nothing is computed.

SMs are dealt out as a GPU does it: a block takes an SM as soon as one is free, the communication's first (its stream has the
higher priority), and a kernel begins when the one before it in its stream and the one that it waits for have ended. What is
missing: both streams' kernels slow each other down in memory and L2, clocks fall under load, and blocks of two kernels may
share an SM.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tilestream.distributed.overlap_costs import OverlapCosts, Work
from tilestream.distributed.weave import COMMUNICATION_BLOCKS, Tiling, middle_of, split_point

OFFSETS = (-256, -128, 0, 128, 256)  # tried around the middle
ALONE_BLOCKS = (16, 32)  # of the fused kernel with nothing beside it
BESIDE_BLOCKS = (2, 4, 8, 16)
_COMMUNICATION, _COMPUTATION = True, False
_STREAMS = (_COMMUNICATION, _COMPUTATION)  # by priority
_FEW, _MORE = 2, 4  # layers that are simulated; the others take as long as the last of these


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch.

    Args:
        name, half: which; half 0 or 1.
        communicates: in the communication's stream; its blocks begin together, for they wait for other ranks.
        work: its blocks.
    """

    name: str
    half: int
    communicates: bool
    work: Work


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, and when its first block began and its last one ended, in seconds from the step's begin."""

    kernel: Kernel
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """A step's time, cut after `first` tokens, with so many blocks of communication beside attention and beside the MLP."""

    first: int
    attention_blocks: int
    mlp_blocks: int
    step_s: float


@dataclass(slots=True)
class _Current:
    """The kernel that a stream is at: its place among all, blocks without an SM, blocks at work."""

    place: int
    ready_s: float
    waiting: int
    working: int = 0
    begin_s: float = 0.0


def timeline(kernels: Sequence[Kernel], num_sms: int, launch_s: float) -> list[Span]:
    """Run kernels in two streams, given in the order in which the host launches them. A kernel waits for the one before it in
    its stream, and for the one before it of its half. Spans come in the order of their ends."""
    before = _predecessors(kernels)
    to_come = {stream: deque(i for i, k in enumerate(kernels) if k.communicates == stream) for stream in _STREAMS}
    current: dict[bool, _Current | None] = dict.fromkeys(_STREAMS)
    ended_s: dict[int, float] = {}
    events: list[tuple[float, int, bool, int]] = []  # when, its number, stream, blocks that end there (0: a kernel is ready)
    numbers = itertools.count()
    spans: list[Span] = []
    free = num_sms

    def start_next() -> None:
        for stream in _STREAMS:
            if current[stream] is None and to_come[stream] and all(i in ended_s for i in before[to_come[stream][0]]):
                place = to_come[stream].popleft()
                ready_s = max((ended_s[i] for i in before[place]), default=0.0) + launch_s
                current[stream] = _Current(place, ready_s, kernels[place].work.num_blocks)
                heapq.heappush(events, (ready_s, next(numbers), stream, 0))

    start_next()
    while events:
        now_s, _, stream, num_ended = heapq.heappop(events)
        free += num_ended
        if num_ended:
            at = current[stream]
            at.working -= num_ended
            if at.working == at.waiting == 0:
                spans.append(Span(kernels[at.place], at.begin_s, now_s))
                ended_s[at.place], current[stream] = now_s, None
                start_next()
        for stream in _STREAMS:
            at = current[stream]
            if at is None or at.ready_s > now_s or not (taken := min(free, at.waiting)):
                continue
            if at.waiting == kernels[at.place].work.num_blocks:
                at.begin_s = now_s
            free, at.waiting, at.working = free - taken, at.waiting - taken, at.working + taken
            if stream is _COMMUNICATION:  # its blocks wait for the last of them
                taken = 0 if at.waiting else at.working
            if taken:
                heapq.heappush(events, (now_s + kernels[at.place].work.block_s, next(numbers), stream, taken))
    return spans


def _predecessors(kernels: Sequence[Kernel]) -> list[list[int]]:
    """Per kernel, the places of the ones before it in its stream and in its half."""
    last: dict[tuple[str, int], int] = {}
    before = []
    for place, kernel in enumerate(kernels):
        keys = (("stream", kernel.communicates), ("half", kernel.half))
        before.append([last[key] for key in keys if key in last])
        last |= dict.fromkeys(keys, place)
    return before


def split_kernels(costs: OverlapCosts, num_tokens: int, first: int, blocks: tuple[int, int], num_layers: int) -> list[Kernel]:
    """A split step's launches. blocks: of the communication beside attention and beside the MLP."""
    halves = ((0, first), (first, num_tokens - first))
    kernels: list[Kernel] = []
    for _ in range(num_layers):
        for part in (_attention, _mlp):
            for half, (start, tokens) in enumerate(halves):
                # The second half's runs beside the same part of the first half, the first half's beside the part before.
                beside_attention = (part is _attention) == (half == 1)
                kernels.append(_fused(costs, half, tokens, blocks[0] if beside_attention else blocks[1]))
                num_sms = costs.num_sms - blocks[0 if part is _attention else 1]
                kernels += part(costs, half, start, tokens, num_sms)
    return kernels


def whole_kernels(costs: OverlapCosts, num_tokens: int, transport: str, num_layers: int) -> list[Kernel]:
    """A step's launches without a split. transport: "fused", or "nccl", "multimem" or "none" followed by add and norm."""
    kernels: list[Kernel] = []
    for _ in range(num_layers):
        for part in (_attention, _mlp):
            if transport == "fused":
                fastest = min(ALONE_BLOCKS, key=lambda blocks: costs.allreduce_norm_s(num_tokens, blocks))
                kernels.append(_fused(costs, 0, num_tokens, fastest))
            else:
                allreduce_s, norm_s = costs.unfused_s(transport, num_tokens)
                if allreduce_s:
                    kernels.append(Kernel("allreduce", 0, True, Work(costs.num_sms, allreduce_s)))
                kernels.append(Kernel("norm", 0, False, Work(costs.num_sms, norm_s)))
            kernels += part(costs, 0, 0, num_tokens, costs.num_sms)
    return kernels


def _fused(costs: OverlapCosts, half: int, num_tokens: int, blocks: int) -> Kernel:
    return Kernel("allreduce_rmsnorm", half, True, Work(blocks, costs.allreduce_norm_s(num_tokens, blocks)))


def _attention(costs: OverlapCosts, half: int, start: int, num_tokens: int, num_sms: int) -> Iterator[Kernel]:
    yield Kernel("qkv", half, False, costs.gemm("qkv", num_tokens))
    yield Kernel("append", half, False, costs.elementwise("append", num_tokens, num_sms))
    yield Kernel("attention", half, False, costs.attention(start, num_tokens, num_sms))
    yield Kernel("o", half, False, costs.gemm("o", num_tokens))


def _mlp(costs: OverlapCosts, half: int, start: int, num_tokens: int, num_sms: int) -> Iterator[Kernel]:
    yield Kernel("gate_up", half, False, costs.gemm("gate_up", num_tokens))
    yield Kernel("act", half, False, costs.elementwise("act", num_tokens, num_sms))
    yield Kernel("down", half, False, costs.gemm("down", num_tokens))


def whole_step_s(costs: OverlapCosts, num_tokens: int, transport: str) -> float:
    """Seconds of a step that is one prompt of num_tokens, not split."""
    return _step_s(costs, lambda layers: whole_kernels(costs, num_tokens, transport, layers))


def split_step_s(costs: OverlapCosts, num_tokens: int, first: int, blocks: tuple[int, int]) -> float:
    """Seconds of a step that is one prompt of num_tokens, cut after `first`."""
    return _step_s(costs, lambda layers: split_kernels(costs, num_tokens, first, blocks, layers))


def _step_s(costs: OverlapCosts, kernels_of: Callable[[int], list[Kernel]]) -> float:
    few_s, more_s = (
        max(span.end_s for span in timeline(kernels_of(layers), costs.num_sms, costs.launch_s)) for layers in (_FEW, _MORE)
    )
    return costs.step_s + few_s + (costs.num_layers - _FEW) * (more_s - few_s) / (_MORE - _FEW)


def rule_cut(costs: OverlapCosts, num_tokens: int) -> int:
    """Where the engine would cut, with nothing measured."""
    return split_point(num_tokens, costs.gemms(), Tiling.beside(COMMUNICATION_BLOCKS, costs.num_sms))


def splits(costs: OverlapCosts, num_tokens: int) -> list[Split]:
    """Cuts around the middle, with every number of blocks."""
    firsts = [middle_of(num_tokens) + offset for offset in OFFSETS]
    return [
        Split(first, beside_attention, beside_mlp, split_step_s(costs, num_tokens, first, (beside_attention, beside_mlp)))
        for first in firsts if 0 < first < num_tokens
        for beside_attention in BESIDE_BLOCKS
        for beside_mlp in BESIDE_BLOCKS
    ]  # fmt: skip
