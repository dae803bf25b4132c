"""Ranks that torchrun has started: each finds its place in the environment, and rank 0 in a store."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from tilestream.distributed import launch
from tilestream.distributed.control import Link, Listener, connect
from tilestream.distributed.torchrun import Place, Torchrun
from tilestream.engine.errors import RankDiedError
from torch.distributed import TCPStore

from tests.distributed.test_processes import script


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def torchrun(rank: int, world_size: int, port: int, host: str = "127.0.0.1") -> Torchrun:
    return Torchrun(Place(rank, world_size, rank, world_size), host, port)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_all(**values: str) -> None:
        common = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for name, value in (common | values).items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "4"}, "tensor_parallel_size is 2, but torchrun has started 4 ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; allowed: at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; allowed: at least 1"),
        ({"RANK": "x"}, "RANK is 'x'; allowed: 0 to 1"),
        ({"RANK": ""}, "RANK is ''; allowed: 0 to 1"),
        ({"RANK": "2"}, "RANK is '2'; allowed: 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'; allowed: 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'; allowed: 1 to 2"),
        ({"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK is '1'; allowed: 0 to 0"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'; allowed: 0 to 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; allowed: 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'; allowed: 1 to 65535"),
    ],
)
def test_variables_that_cannot_be(environment: Callable[..., None], values: dict, message: str) -> None:
    environment(**values)
    with pytest.raises(ValueError) as raised:
        launch.gather(2, print)
    assert str(raised.value).startswith(message)


def test_variables(environment: Callable[..., None]) -> None:
    environment(WORLD_SIZE="4", RANK="3", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1", MASTER_PORT="29500")
    assert Torchrun.find(4) == Torchrun(Place(3, 4, 1, 2), "127.0.0.1", 29500)


@pytest.mark.parametrize("there", ["nothing", "a store", "itself"])
def test_rank_0_does_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], there: str) -> None:
    port = free_port()
    if there == "a store":  # as torchrun's agent opens it
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        store.set("another", "")
    if there == "itself":  # a connection to a free port gets it as its own by chance, and then that is what answers
        bound = functools.partial(socket.create_connection, source_address=("127.0.0.1", port))
        monkeypatch.setattr(socket, "create_connection", bound)
    begin_s = time.monotonic()
    with pytest.raises(RankDiedError, match=f"^rank 0 of 2 has not come to 127.0.0.1:{port} within 1 s; rank 1 ends$"):
        torchrun(1, 2, port).find_rank_0(1)
    assert 0.9 < time.monotonic() - begin_s < 3
    assert capfd.readouterr().err == ""


def test_rank_0_comes_late() -> None:
    port = free_port()
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(torchrun(1, 2, port).find_rank_0(20)))
    other.start()
    time.sleep(1)
    store = torchrun(0, 2, port).store(20)
    time.sleep(0.5)
    store.set("rank 0", "far 4711 abcd")
    other.join()
    assert found == [(("far", 4711), b"\xab\xcd")]


def test_the_stores_port_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        where = rf"127.0.0.1:{port} \(MASTER_ADDR, MASTER_PORT\)"
        with pytest.raises(RankDiedError, match=f"^rank 0 of 2 cannot open the ranks' store at {where}: .* already in use"):
            torchrun(0, 2, port).store(60)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["no such host", "a" * 70])
@pytest.mark.parametrize(("rank", "verb"), [(0, "open"), (1, "reach")])
def test_a_host_that_nobody_knows(rank: int, verb: str, host: str) -> None:
    begin_s = time.monotonic()
    with pytest.raises(RankDiedError, match=f"^rank {rank} of 2 cannot {verb} the ranks' store at {host}:29500 "):
        torchrun(rank, 2, 29500, host).store(60)
    assert time.monotonic() - begin_s < 10


def test_rank_0_is_not_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    refuse = functools.partial(socket.create_connection, source_address=("192.0.2.1", 0))  # no address of this machine
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(RankDiedError, match=f"^rank 0 of 2 cannot reach the ranks' store at 127.0.0.1:{port} within 1 s$"):
        torchrun(0, 2, port).store(1)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([(1, 11, 3), (2, 12, 4)], r"process 12 on \S+ came as rank 2 of 4, and rank 0 waits for 3 ranks \(WORLD_SIZE\)"),
        ([(1, 11, 3), (7, 12, 3)], r"process 12 on \S+ came as rank 7; allowed: 1 to 2"),
        ([(1, 11, 3), (1, 12, 3)], r"rank 1 of 3 came twice \(process 11 on \S+, process 12 on \S+\)"),
    ],
)
def test_a_wrong_rank_comes(environment: Callable[..., None], others: list[tuple[int, int, int]], words: str) -> None:
    """All hear of it: rank 0, who was right, and who was not."""
    environment(WORLD_SIZE="3", MASTER_PORT=str(free_port()))
    heard: list[str] = []

    def come() -> None:
        links = []
        for rank, pid, world_size in others:
            address, key = torchrun(rank, world_size, int(os.environ["MASTER_PORT"])).find_rank_0(20)
            links.append(connect(address, key, rank, world_size, pid))
        heard.extend(link.life.recv() for link in links)

    other = threading.Thread(target=come)
    other.start()
    with pytest.raises(RankDiedError, match=f"^{words}$") as raised:
        launch.gather(3, print, timeout_s=20)
    other.join(10)
    assert heard == [str(raised.value)] * 2


def test_two_processes_of_one_rank_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener("127.0.0.1", b"key")
    in_turns, reach = threading.Barrier(2), socket.create_connection

    def reach_in_turns(*to: object, **how: object) -> socket.socket:
        in_turns.wait(10)
        return reach(*to, **how)

    monkeypatch.setattr(socket, "create_connection", reach_in_turns)
    links: dict[int, Link] = {}

    def come(pid: int) -> None:
        links[pid] = connect(("127.0.0.1", listener.port), b"key", 1, 2, pid)

    others = [threading.Thread(target=come, args=(pid,)) for pid in (11, 12)]
    for other in others:
        other.start()
    ours = [link for link in (listener.accept(10) for _ in range(4)) if link is not None]
    for other in others:
        other.join()
    assert sorted(link.pid for link in ours) == [11, 12]
    for link in ours:
        link.orders.send(link.pid)
        assert links[link.pid].orders.recv() == link.pid
    listener.close()


def test_a_key_of_another_run() -> None:
    listener = Listener("127.0.0.1", b"new key")
    other = threading.Thread(target=listener.accept, args=(20,))
    other.start()
    with pytest.raises(RankDiedError, match=f"^rank 1 of 2 cannot reach rank 0 at 127.0.0.1:{listener.port}: Authentication"):
        launch.join(Place(1, 2, 1, 2), ("127.0.0.1", listener.port), b"old key")
    other.join()
    listener.close()


def by_torchrun(order: tuple[int, ...], then: str = "") -> dict[int, tuple[int, str, str]]:
    """Of each rank: exit code, output, errors."""
    environment = {"WORLD_SIZE": str(len(order)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = {}
    for rank in order:
        processes[rank] = script(len(order), then, RANK=str(rank), **environment)
        time.sleep(1)
    outputs = {rank: process.communicate(timeout=60) for rank, process in processes.items()}
    return {rank: (processes[rank].returncode, *outputs[rank]) for rank in sorted(order)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_come_in_any_order(order: tuple[int, ...]) -> None:
    assert by_torchrun(order) == {0: (0, "rank 0 is done\n", ""), 1: (0, "", "")}


KILL_RANK_1 = """
os.kill(ranks._workers[0].link.pid, signal.SIGKILL)
ranks._watcher.join()
sys.exit(str(ranks.failure))
"""


def test_who_survives_says_who_died() -> None:
    first, killed, other = by_torchrun((0, 1, 2), KILL_RANK_1).values()
    assert killed == (-9, "", "") and (first[0], other[0]) == (1, 1)
    reason, end, rest = first[2].partition("; all ranks end\n")
    assert reason.startswith("rank 1 of 3 (process ") and end and rest == ""
    assert other[2] == f"tilestream: rank 2 of 3 ends: {reason}\n"
