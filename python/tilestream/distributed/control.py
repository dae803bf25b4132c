"""What rank 0 tells the other ranks: messages, and the two connections that each of them has to it.

A step is told as the plan's difference to the step before: what a rank keeps is the page lists of one step, so nothing is
left of a request that has ended, was preempted, or sat a step out, and there is nothing else to keep in agreement.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

from tilestream.engine.config import EngineConfig
from tilestream.engine.prefix_groups import PrefixGroup
from tilestream.engine.request import Request
from tilestream.engine.step_plan import StepPlan

_HANDSHAKE_S = 10
_NOT_SENT = -1, None, 0
# A machine that is gone without a word is found out by TCP's own probes: after about ten seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message.

    Args:
        store: host and port of the torch.distributed store.
        device_type: "cpu" or "cuda".
        load: called with the rank's Place, after torch.distributed is there; gives a Loaded.
    """

    store: tuple[str, int]
    device_type: str
    load: Callable[[Any], Loaded]


class Loaded(Protocol):
    """A rank's part of a model.

    room_tokens: what its KV cache may hold.
    weight_bytes: of its weight matrices.
    """

    room_tokens: int
    weight_bytes: int

    def build(self, config: EngineConfig) -> Follower:
        """What runs it."""


class Follower(Protocol):
    """Does a rank's part of steps that rank 0 has scheduled."""

    def follow(self, plan: StepPlan, draws: Any) -> None: ...

    def clear_pages(self, num_pages: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Build:
    """Build the runner, for an engine with these limits."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class ClearPages:
    """Runner.clear_pages."""

    num_pages: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The last message: end, with exit code 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """A StepPlan. The lists up to num_new_pages have one entry for each scheduled item.

    Args:
        previous: where its request stood in the step before; -1: it was not there, or has other pages now.
        starts, num_new_tokens: as in ScheduledRequest.
        num_tokens: of the request.
        num_new_pages: how many of `pages` are its own: those that come behind what it had in the step before.
        token_ids: of all items, one after the other: those that this step computes.
        pages: see num_new_pages.
        prefix_groups: as in StepPlan.
        draws: what the runner needs for its part of the draw.
    """

    previous: list[int]
    starts: list[int]
    num_new_tokens: list[int]
    num_tokens: list[int]
    num_new_pages: list[int]
    token_ids: list[int]
    pages: list[int]
    prefix_groups: list[PrefixGroup]
    draws: Any


class StepWriter:
    """Rank 0's end: plans to bytes."""

    def __init__(self) -> None:
        self._sent: dict[Request, tuple[int, list[int], int]] = {}  # of the step before: place, pages, how many of them

    def write(self, plan: StepPlan, draws: Any) -> bytes:
        """A plan, pickled. The other end must read every one of them, in this order."""
        previous, starts, num_new_tokens, num_tokens, num_new_pages, token_ids, new_pages = lists = [[] for _ in range(7)]
        sent: dict[Request, tuple[int, list[int], int]] = {}
        for place, item in enumerate(plan.scheduled):
            request, start = item.request, item.start
            pages = request.pages
            before, known, num_known = self._sent.get(request, _NOT_SENT)
            if known is not pages or num_known > len(pages):  # new here, or back from a preemption
                before, num_known = -1, 0
            sent[request] = place, pages, len(pages)
            previous.append(before)
            starts.append(start)
            num_new_tokens.append(item.num_new_tokens)
            num_tokens.append(len(request.token_ids))
            num_new_pages.append(len(pages) - num_known)
            token_ids += request.token_ids[start : start + item.num_new_tokens]
            new_pages += pages[num_known:]
        message = pickle.dumps(Step(*lists, plan.prefix_groups, draws), pickle.HIGHEST_PROTOCOL)
        self._sent = sent
        return message


class StepReader:
    """Another rank's end: a Step back to a plan, as far as the model's step reads it."""

    def __init__(self) -> None:
        self._pages: list[list[int]] = []  # of each item of the step before

    def read(self, step: Step) -> StepPlan:
        plan = StepPlan(prefix_groups=step.prefix_groups)
        num_tokens = num_pages = 0
        for previous, start, num_new, length, num_new_pages in zip(
            step.previous, step.starts, step.num_new_tokens, step.num_tokens, step.num_new_pages, strict=True
        ):
            pages = self._pages[previous] if previous >= 0 else []  # a list of its own: the block table goes by identity
            pages += step.pages[num_pages : num_pages + num_new_pages]
            tokens = _Tokens(start, step.token_ids[num_tokens : num_tokens + num_new], length)
            plan.add(RemoteRequest(tokens, start, pages), num_new)
            num_tokens += num_new
            num_pages += num_new_pages
        self._pages = [item.request.pages for item in plan.scheduled]
        return plan


@dataclass(slots=True)
class _Tokens:
    """A request's tokens on a rank that knows those of one step alone."""

    start: int
    token_ids: list[int]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, span: slice) -> list[int]:
        if not self.start <= span.start <= span.stop <= self.start + len(self.token_ids):
            known = f"[{self.start}, {self.start + len(self.token_ids)})"
            raise IndexError(f"tokens [{span.start}, {span.stop}) of a request are asked for; this rank knows {known}")
        return self.token_ids[span.start - self.start : span.stop - self.start]


@dataclass(eq=False, slots=True)
class RemoteRequest:
    """A Request on a rank that does not schedule: what the model's step reads of it."""

    token_ids: _Tokens
    num_computed_tokens: int
    pages: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class Link:
    """The two connections between rank 0 and another one.

    Args:
        rank, world_size: the other one's, and how many it was told there are.
        pid, host: of its process.
        orders: messages of rank 0, and nothing the other way.
        life: answers of the other rank, and a last word of either. Both ends watch it: that it ends says that the process has.
    """

    rank: int
    world_size: int
    pid: int
    host: str
    orders: Connection = field(repr=False)
    life: Connection = field(repr=False)

    def hang_up(self, reason: str) -> None:
        """End both connections, with a last word for the other rank; whoever waits on one of them, here or there, hears it."""
        with suppress(OSError):
            self.life.send(reason)
        for connection in (self.orders, self.life):
            with suppress(OSError), _socket_of(connection) as link:
                link.shutdown(socket.SHUT_RDWR)


def connect(address: tuple[str, int], key: bytes, rank: int, world_size: int, pid: int) -> Link:
    """Another rank's way to rank 0.

    Raises:
        OSError, EOFError: nobody is there.
        multiprocessing.AuthenticationError: it is somebody else.
    """
    connections = []
    for role in ("orders", "life"):
        connection = _wrap(socket.create_connection(address, timeout=_HANDSHAKE_S))
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send((role, rank, world_size, pid, socket.gethostname()))
        connections.append(connection)
    return Link(rank, world_size, pid, socket.gethostname(), *connections)


class Listener:
    """Where the other ranks come to.

    Args:
        host: an address of this machine; "" for all of them.
        key: who does not know it is not let in.
    Attributes:
        port: what it listens on.
    """

    def __init__(self, host: str, key: bytes) -> None:
        self._server = socket.create_server((host, 0), backlog=64)
        self._key = key
        self._half: dict[tuple[int, int, int, str], Connection] = {}  # a process's first connection
        self.port: int = self._server.getsockname()[1]

    def accept(self, timeout_s: float) -> Link | None:
        """The next rank that is there with both connections; None if none comes in time."""
        self._server.settimeout(timeout_s)
        try:
            connection = _wrap(self._server.accept()[0])
        except TimeoutError:
            return None
        try:
            _limit_reads(connection, _HANDSHAKE_S)
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            role, *process = connection.recv()
            _limit_reads(connection, 0)
        except (OSError, EOFError, AuthenticationError):  # none of ours
            connection.close()
            return None
        if role == "orders":
            self._half[tuple(process)] = connection
            return None
        return Link(*process, self._half.pop(tuple(process)), connection)

    def close(self) -> None:
        self._server.close()
        for connection in self._half.values():
            connection.close()


def _wrap(link: socket.socket) -> Connection:
    """A connection that sends a small message at once, and notices when the other machine is gone."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(link.detach())


def _limit_reads(connection: Connection, seconds: int) -> None:
    """Reads that take longer fail; 0: none does."""
    with _socket_of(connection) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))
