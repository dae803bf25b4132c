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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from multiprocessing import AuthenticationError
from typing import Any

from tilestream.distributed.control import Link, Listener, Loaded, Setup, connect
from tilestream.distributed.ranks import Ranks, Worker, in_words, reason_of
from tilestream.distributed.torchrun import Place, Torchrun
from tilestream.engine.errors import RankDiedError

KEY_VARIABLE = "TILESTREAM_RANKS_KEY"  # what rank 0 and the ranks that it starts know each other by
JOIN_S = 120  # from the first rank's coming to the last one's
_POLL_S = 0.2
_COLLECTIVE_S = 600  # longer than one rank loads after another; a death is noticed at once in other ways
LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_latest: Ranks | None = None  # who had torch.distributed last: there is one for the process

# Modules are found as rank 0 finds them, and not, as with `python -m`, in the current directory first.
_WORK = "import sys; sys.path[:] = filter(None, sys.path); from tilestream.distributed.worker import main; main()"


def gather(
    world_size: int, load: Callable[[Place], Loaded], *, device_type: str = "cpu", timeout_s: float = JOIN_S
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

    global _latest
    if _latest is not None and _latest.failure is not None:
        _latest.close()  # nobody has, perhaps
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process, and a tensor-parallel model has it to itself; close() the LLM that "
            "uses it"
        )
    torchrun = Torchrun.find(world_size)
    place = Place(0, world_size, 0, world_size) if torchrun is None else torchrun.place
    here = torchrun is None or (place.local_world_size == world_size and _is_loopback(torchrun.host))
    host = LOOPBACK if here else ""
    address = host or torchrun.host
    with ExitStack() as undo:
        if torchrun is None:
            undo.enter_context(_on_loopback())
        workers = _meet(torchrun, world_size, host, address, timeout_s)
        ranks = _latest = Ranks(workers, undo.pop_all().close)
    try:
        store, port = _open_store(host)
        ranks.tell(Setup((address, port), device_type, load))
        ranks.unless_one_dies(lambda: initialise(place, store, device_type))
    except BaseException:
        ranks.close()
        raise
    return ranks, place


def join(place: Place, address: tuple[str, int], key: bytes) -> Link:
    """Come to rank 0; called by every other rank.

    Raises:
        RankDiedError: it is not there.
    """
    try:
        return connect(address, key, place.rank, place.world_size, os.getpid())
    except (OSError, EOFError, AuthenticationError) as error:
        host, port = address
        raise RankDiedError(f"{place} cannot reach rank 0 at {host}:{port}: {in_words(error)}") from None


def initialise(place: Place, store: Any, device_type: str) -> None:
    """torch.distributed, in all ranks at the same time."""
    import torch.distributed as dist

    # A call that was left alone, as its ranks had died, has counted; the stores' keys go by that number.
    dist.distributed_c10d._world.group_count = 0
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", store=store, rank=place.rank,
        world_size=place.world_size, timeout=timedelta(seconds=_COLLECTIVE_S),
    )  # fmt: skip


def store_at(address: tuple[str, int]) -> Any:
    """The store that rank 0 has opened for torch.distributed."""
    from torch.distributed import TCPStore

    return TCPStore(*address, is_master=False, timeout=timedelta(seconds=JOIN_S))


def _open_store(host: str) -> tuple[Any, int]:
    from torch.distributed import TCPStore

    server = socket.create_server((host, 0))
    port = server.getsockname()[1]
    store = TCPStore(
        host or "localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S),
        master_listen_fd=server.detach(),
    )  # fmt: skip
    return store, port


@contextmanager
def _on_loopback() -> Iterator[None]:
    """torch.distributed's connections stay on this machine: in this process, and in those that it starts."""
    ours = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, _LOOPBACK_INTERFACE))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _meet(torchrun: Torchrun | None, world_size: int, host: str, address: str, timeout_s: float) -> list[Worker]:
    """All other ranks; none of them is left if one does not come.

    Args:
        host: where rank 0 listens; "": everywhere.
        address: where the others find it.
    """
    key = secrets.token_bytes(32)
    processes: dict[int, subprocess.Popen] = {}
    links: dict[int, Link] = {}
    with closing(Listener(host, key)) as listener:
        try:
            if torchrun is None:
                for rank in range(1, world_size):
                    processes[rank] = _start(rank, world_size, listener.port, key)
            else:
                torchrun_store = torchrun.store(timeout_s)  # lives as long as others may ask it
                torchrun_store.set("rank 0", f"{address} {listener.port} {key.hex()}")
            _wait_for(links, world_size, listener, processes, timeout_s)
        except BaseException as error:
            for process in processes.values():
                process.kill()
                process.wait()
            for link in links.values():
                link.hang_up(reason_of(error, world_size))
            raise
    return [Worker(links[rank], processes.get(rank)) for rank in range(1, world_size)]


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
        if link is None:
            continue
        if link.world_size != world_size:
            one = f"rank {link.rank} of {link.world_size}"
            text = f"process {link.pid} on {link.host} came as {one}, and rank 0 waits for {world_size} ranks (WORLD_SIZE)"
        elif not 1 <= link.rank < world_size:
            text = f"process {link.pid} on {link.host} came as rank {link.rank}; allowed: 1 to {world_size - 1}"
        elif link.rank in links:
            first, second = (f"process {one.pid} on {one.host}" for one in (links[link.rank], link))
            text = f"rank {link.rank} of {world_size} came twice ({first}, {second})"
        else:
            links[link.rank] = link
            continue
        link.hang_up(text)
        raise RankDiedError(text)


def _is_loopback(host: str) -> bool:
    with suppress(OSError):
        return socket.gethostbyname(host).startswith("127.")
    return False
