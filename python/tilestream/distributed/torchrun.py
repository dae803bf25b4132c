"""What torchrun has told a process, and the store in which its ranks find each other."""

from __future__ import annotations

import os
import socket
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tilestream.engine.errors import RankDiedError

_POLL_S = 0.2
_CONNECT_S = 5  # one try, where a machine does not even refuse
_ANSWER_S = 10  # the least that a store gets which has come at the last moment


@dataclass(frozen=True, slots=True)
class Place:
    """A process among the ranks.

    Args:
        rank, world_size: its number, and how many there are.
        local_rank, local_world_size: the same among those of its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


@dataclass(frozen=True, slots=True)
class Torchrun:
    """What torchrun has told this process."""

    place: Place
    host: str
    port: int

    @staticmethod
    def find(world_size: int) -> Torchrun | None:
        """None if torchrun has not started this process.

        Args:
            world_size: how many ranks are wanted.
        Raises:
            ValueError: torchrun has started another number, or one of its variables cannot be.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in os.environ for name in names):
            return None
        size = _number("WORLD_SIZE", 1, None)
        if size != world_size:
            raise ValueError(f"tensor_parallel_size is {world_size}, but torchrun has started {size} ranks (WORLD_SIZE)")
        rank = _number("RANK", 0, size - 1)
        local_size = _number("LOCAL_WORLD_SIZE", 1, size, default=size)
        local_rank = _number("LOCAL_RANK", 0, local_size - 1, default=rank)
        place = Place(rank, size, local_rank, local_size)
        return Torchrun(place, os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 65535))

    def store(self, timeout_s: float) -> Any:
        """torchrun's store, where the ranks find each other. Without its agent rank 0 opens it.

        Args:
            timeout_s: after which whoever opens it is missed.
        Raises:
            RankDiedError: it is not there, or cannot be opened.
        """
        from torch.distributed import PrefixStore, TCPStore

        opens = self.place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        end_s = time.monotonic() + timeout_s
        store = None
        try:
            socket.getaddrinfo(self.host, self.port)  # a name that nobody knows is told at once
            with socket.create_server(("", self.port)) if opens else nullcontext() as server:
                if self._answers(end_s):
                    store = TCPStore(
                        self.host, self.port, is_master=opens, wait_for_workers=False,
                        timeout=timedelta(seconds=max(_ANSWER_S, end_s - time.monotonic())),
                        master_listen_fd=None if server is None else server.detach(),
                    )  # fmt: skip
        except (OSError, UnicodeError, RuntimeError) as error:  # torch's errors of stores are RuntimeErrors
            what = f"cannot {'open' if opens else 'reach'} the ranks' store at {self._where} (MASTER_ADDR, MASTER_PORT)"
            raise RankDiedError(f"{self.place} {what}: {error}") from error
        if store is None:
            raise self._missing(timeout_s)
        return PrefixStore(f"tilestream/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def find_rank_0(self, timeout_s: float) -> tuple[tuple[str, int], bytes]:
        """Where rank 0 is, and the key to it.

        Raises:
            RankDiedError: rank 0 has not come.
        """
        end_s = time.monotonic() + timeout_s
        store = self.store(timeout_s)
        try:
            while not (has_come := store.check(["rank 0"])) and time.monotonic() < end_s:  # get() would log its time-out
                time.sleep(_POLL_S)
            words = store.get("rank 0").decode().split() if has_come else None
        except RuntimeError as error:
            raise RankDiedError(f"{self.place} has lost the ranks' store at {self._where}: {error}") from error
        if words is None:
            raise self._missing(timeout_s)
        host, port, key = words
        return (host, int(port)), bytes.fromhex(key)

    def _missing(self, timeout_s: float) -> RankDiedError:
        """What to raise where nobody has come in time."""
        if self.place.rank == 0:
            return RankDiedError(f"{self.place} cannot reach the ranks' store at {self._where} within {timeout_s:g} s")
        text = f"rank 0 of {self.place.world_size} has not come to {self._where} within {timeout_s:g} s"
        return RankDiedError(f"{text}; rank {self.place.rank} ends")

    @property
    def _where(self) -> str:
        return f"{self.host}:{self.port}"

    def _answers(self, end_s: float) -> bool:
        """Wait until somebody listens there. (TCPStore waits twice as long as it is told, and rests in between.)"""
        while (left_s := end_s - time.monotonic()) > 0:
            with suppress(OSError), socket.create_connection((self.host, self.port), min(left_s, _CONNECT_S)) as link:
                if link.getsockname() != link.getpeername():  # else a free port of this machine has reached itself
                    return True
            time.sleep(min(_POLL_S, left_s))
        return False


def _number(name: str, least: int, most: int | None, *, default: int | None = None) -> int:
    """An environment variable's.

    Raises:
        ValueError: it is none, or not one of those allowed.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    with suppress(ValueError):
        number = int(text)
        if least <= number and (most is None or number <= most):
            return number
    raise ValueError(f"{name} is {text!r}; allowed: " + (f"at least {least}" if most is None else f"{least} to {most}"))
