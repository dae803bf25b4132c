"""How the ranks come together: rank 0 starts the others, or torchrun has started them all.

Under torchrun a process reads its rank from the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), and rank 0
leaves its address in torchrun's store. Without it rank 0 starts tilestream.distributed.worker for every other rank, on this
machine, and nothing of it can be reached from another. In both cases the others come to rank 0, in any order, and are told
all that they need.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tilestream.distributed.control import Link, Listener, Loaded, Setup, connect
from tilestream.distributed.ranks import Ranks, Worker
from tilestream.engine.errors import RankDiedError

KEY_VARIABLE = "TILESTREAM_RANKS_KEY"  # what rank 0 and the ranks that it starts know each other by
_JOIN_S = 120  # from the first rank's coming to the last one's
_POLL_S = 0.2
_COLLECTIVE_S = 600  # longer than one rank loads after another; a death is noticed at once in other ways
LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


# Modules are found as rank 0 finds them, and not, as with `python -m`, in the current directory first.
_WORK = "import sys; sys.path[:] = filter(None, sys.path); from tilestream.distributed.worker import main; main()"


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
            ValueError: torchrun has started another number.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in os.environ for name in names):
            return None
        rank, size, host, port = (os.environ[name] for name in names)
        if int(size) != world_size:
            raise ValueError(f"tensor_parallel_size is {world_size}, but torchrun has started {size} ranks (WORLD_SIZE)")
        local_rank, local_size = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", size)
        return Torchrun(Place(int(rank), world_size, int(local_rank), int(local_size)), host, int(port))

    def store(self, timeout_s: float) -> Any:
        """torchrun's store, where the ranks find each other."""
        from torch.distributed import PrefixStore, TCPStore

        is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            self.host, self.port, is_master=self.place.rank == 0 and not is_torchruns, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        return PrefixStore(f"tilestream/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def gather(
    world_size: int, load: Callable[[Place], Loaded], *, device_type: str = "cpu", timeout_s: float = _JOIN_S
) -> tuple[Ranks, Place]:
    """Bring all ranks together; called by rank 0. torch.distributed is initialised afterwards.

    Args:
        world_size: how many ranks, this one included: at least 2.
        load: what the others do first (Setup.load); plain data, or a function that they can import.
        device_type: "cpu" or "cuda".
        timeout_s: after which a rank that has not come is missed.
    Returns:
        The others, and this process's place.
    Raises:
        RankDiedError: a rank has not come, or has ended; says which.
        ValueError: torchrun has started another number of ranks, or torch.distributed is in use.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process, and a tensor-parallel model has it to itself; close() the LLM that "
            "uses it"
        )
    torchrun = Torchrun.find(world_size)
    place = Place(0, world_size, 0, world_size) if torchrun is None else torchrun.place
    if torchrun is None:
        for backend in ("GLOO", "NCCL"):  # the others inherit it
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
    key = secrets.token_bytes(32)
    here = torchrun is None or (place.local_world_size == world_size and _is_loopback(torchrun.host))
    host = LOOPBACK if here else ""
    address = host or torchrun.host
    listener = Listener(host, key)
    processes: dict[int, subprocess.Popen] = {}
    links: dict[int, Link] = {}
    try:
        if torchrun is None:
            processes = {rank: _start(rank, world_size, listener.port, key) for rank in range(1, world_size)}
        else:
            torchrun_store = torchrun.store(timeout_s)  # lives as long as others may ask it
            torchrun_store.set("rank 0", f"{address} {listener.port} {key.hex()}")
        _wait_for(links, world_size, listener, processes, timeout_s)
    except BaseException:
        for process in processes.values():
            process.kill()
            process.wait()
        raise
    finally:
        listener.close()
    ranks = Ranks([Worker(links[rank], processes.get(rank)) for rank in range(1, world_size)])
    store, port = _open_store(host)
    ranks.tell(Setup((address, port), device_type, load))
    ranks.unless_one_dies(lambda: initialise(place, store, device_type))
    return ranks, place


def join(place: Place, address: tuple[str, int], key: bytes) -> Link:
    """Come to rank 0; called by every other rank.

    Raises:
        RankDiedError: it is not there.
    """
    try:
        return connect(address, key, place.rank, os.getpid())
    except (OSError, EOFError) as error:
        host, port = address
        who = f"rank {place.rank} of {place.world_size}"
        raise RankDiedError(f"{who} cannot reach rank 0 at {host}:{port}: {error}") from None


def find_rank_0(torchrun: Torchrun, timeout_s: float = _JOIN_S) -> tuple[tuple[str, int], bytes]:
    """Where rank 0 is, and the key to it.

    Raises:
        RankDiedError: rank 0 has not come.
    """
    try:
        host, port, key = torchrun.store(timeout_s).get("rank 0").decode().split()
    except RuntimeError as error:  # torch's errors of stores are such
        place = torchrun.place
        text = f"rank 0 of {place.world_size} has not come to {torchrun.host}:{torchrun.port} within {timeout_s:g} s"
        raise RankDiedError(f"{text}; rank {place.rank} ends") from error
    return (host, int(port)), bytes.fromhex(key)


def initialise(place: Place, store: Any, device_type: str) -> None:
    """torch.distributed, in all ranks at the same time."""
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", store=store, rank=place.rank,
        world_size=place.world_size, timeout=timedelta(seconds=_COLLECTIVE_S),
    )  # fmt: skip


def store_at(address: tuple[str, int]) -> Any:
    """The store that rank 0 has opened for torch.distributed."""
    from torch.distributed import TCPStore

    return TCPStore(*address, is_master=False, timeout=timedelta(seconds=_JOIN_S))


def _open_store(host: str) -> tuple[Any, int]:
    from torch.distributed import TCPStore

    server = socket.create_server((host, 0))
    port = server.getsockname()[1]
    store = TCPStore(
        host or "localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_JOIN_S),
        master_listen_fd=server.detach(),
    )  # fmt: skip
    return store, port


def _start(rank: int, world_size: int, port: int, key: bytes) -> subprocess.Popen:
    command = [sys.executable, "-c", _WORK, str(rank), str(world_size), str(port)]
    environment = os.environ | {KEY_VARIABLE: key.hex(), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    # In a session of its own: Ctrl-C in the terminal is for rank 0, which lets answers end before it ends the others.
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait_for(
    links: dict[int, Link], world_size: int, listener: Listener, processes: dict[int, subprocess.Popen], timeout_s: float
) -> None:
    """Accept every rank."""
    end_s = time.monotonic() + timeout_s
    while len(links) < world_size - 1:
        missing = [rank for rank in range(1, world_size) if rank not in links]
        for rank in missing:
            if rank in processes and (code := processes[rank].poll()) is not None:
                raise RankDiedError(f"rank {rank} of {world_size} has ended with exit code {code} before it joined")
        if time.monotonic() > end_s:
            names = ", ".join(map(str, missing))
            word = "rank" if len(missing) == 1 else "ranks"
            raise RankDiedError(f"{word} {names} of {world_size} did not come within {timeout_s:g} s")
        link = listener.accept(_POLL_S)
        if link is not None:
            links[link.rank] = link


def _is_loopback(host: str) -> bool:
    with suppress(OSError):
        return socket.gethostbyname(host).startswith("127.")
    return False
