"""Communicators between processes: shared memory and gloo."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import in_rank
from tests.distributed.in_rank import EPS, HIDDEN, MODES
from tilestream import ops, testing
from tilestream.distributed import connect
from tilestream.distributed.probe import UnavailableError
from tilestream.engine.errors import RankDiedError
from tilestream.placement import CPU
from tilestream.reference import norm as reference
from tilestream.testing import Ranks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.mark.parametrize("transport", ["shared memory", "collectives"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 7, 64])
def test_allreduce_rmsnorm(ranks: Ranks, transport: str, dtype: torch.dtype, num_tokens: int) -> None:
    world_size = len(ranks.processes)
    found = ranks.call(in_rank.reduce, transport, num_tokens, dtype)
    for mode in MODES:
        first, _ = found[0][mode]
        assert all(torch.equal(a, b) for other in found for a, b in zip(other[mode][0], first, strict=True)), mode
    x, residual, weight = in_rank.values(world_size, num_tokens, dtype)
    exact, plain = sum(t.double() for t in x), sum(x[1:], x[0])
    want, want_sum = reference.fused_add_rms_norm(exact, residual, weight, EPS)
    plain_sum = plain + residual
    cast = weight.to(dtype)
    check = testing.assert_as_good_as_plain
    check(found[0]["sum"][0][0], exact, plain, "sum")
    check(found[0]["norm"][0][0], reference.rms_norm(exact, weight, EPS), F.rms_norm(plain, (HIDDEN,), cast, EPS), "norm")
    check(found[0]["residual"][0][0], want, F.rms_norm(plain_sum, (HIDDEN,), cast, EPS), "x")
    each = -(-num_tokens // world_size)
    for rank, of_rank in enumerate(found):
        rows = slice(rank * each, (rank + 1) * each) if transport == "shared memory" else slice(None)
        check(of_rank["residual"][1][rows], want_sum[rows], plain_sum[rows], "residual")
    if transport == "shared memory":  # bit for bit the separate ops, on the sum in order of the ranks
        total = sum((t.float() for t in x[1:]), x[0].float())
        new_residual = (total + residual.float()).to(dtype)
        for mode, k4 in (("int8", 0), ("int4", 256)):
            rows = ops.fused_add_rms_norm_quant(torch.zeros_like(residual), new_residual.clone(), weight, eps=EPS, k4=k4)
            assert all(map(torch.equal, found[0][mode][0], (rows.q, rows.scale, rows.sum))), mode
        assert torch.equal(found[0]["residual"][0][0], ops.rms_norm(new_residual, weight, eps=EPS))


@pytest.mark.parametrize("transport", ["shared memory", "collectives"])
def test_all_gather(ranks: Ranks, transport: str) -> None:
    ranks.call(in_rank.gather_all, transport)


def test_memory(ranks: Ranks) -> None:
    assert ranks.call(in_rank.use_memory) == [[64, 192, 256, 100, 64, 1]] * len(ranks.processes)


def test_memory_of_elsewhere_is_copied(ranks: Ranks) -> None:
    ranks.call(in_rank.reduce_ordinary_memory)


def test_a_program_repeats_it(ranks: Ranks) -> None:
    ranks.call(in_rank.replay)


@pytest.mark.parametrize(
    ("spoil", "transport", "why"),
    [
        (in_rank.nothing, "shared memory", "^{} ranks, joined by shared memory$"),
        (in_rank.no_memory_on_rank_1, "gloo", "^{} ranks, joined by gloo; not shared memory: rank 1: .*Cannot allocate memory"),
        (in_rank.another_host_on_rank_1, "gloo", "; not shared memory: rank 0 is on .*, rank 1 on far, or in another container$"),
        (in_rank.closed_proc, "shared memory", "joined by shared memory$"),
        (in_rank.another_file_on_rank_1, "gloo", "; not shared memory: rank 1: /proc/.* is another file here; rank 1: /dev/shm"),
        (
            in_rank.no_files_on_rank_0,
            "gloo",
            "; not shared memory: rank 0: .*Cannot allocate memory; rank 0: .*Cannot allocate memory$",
        ),
    ],
)
def test_all_agree_on_a_transport(ranks: Ranks, spoil: Callable, transport: str, why: str) -> None:
    before = set(os.listdir("/dev/shm"))
    world_size = len(ranks.processes)
    found = ranks.call(in_rank.open_spoilt, spoil, "auto")
    assert [one[0] for one in found] == [transport] * world_size
    assert re.search(why.format(world_size), found[0][1]), found[0][1]
    assert [one[1] for one in found[1:]] == [""] * (world_size - 1)  # one line, by rank 0
    assert [one[2] for one in found] == [world_size * (world_size + 1) / 2] * world_size
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("tilestream")} == set()


def test_a_transport_that_must_be(ranks: Ranks) -> None:
    for rank in range(len(ranks.processes)):
        ranks.begin(rank, in_rank.open_spoilt, in_rank.another_host_on_rank_1, "shared memory")
    for rank in range(len(ranks.processes)):
        with pytest.raises(
            UnavailableError, match="the transport shared memory is not to be had: rank 0 is on .*, rank 1 on far"
        ):
            ranks.result(rank)


def test_no_such_transport() -> None:
    with pytest.raises(ValueError, match="transport is 'peer'; allowed on cpu: auto, shared memory, collectives"):
        connect(None, CPU, num_bytes=1, transport="peer")


@pytest.mark.parametrize("order", [(1, 0), (3, 0, 2, 1)], ids=str)
@pytest.mark.parametrize("transport", ["shared memory", "collectives"])
def test_a_killed_rank_is_named(tmp_path: Path, transport: str, order: tuple[int, ...]) -> None:
    """Ranks started in any order; the others fail within seconds, and nothing of the memory is left."""
    before = set(os.listdir("/dev/shm"))
    world_size, dead = len(order), order[0]
    ranks = Ranks(world_size, tmp_path, order)
    others = [rank for rank in range(world_size) if rank != dead]
    ranks.call(in_rank.come_once, transport, 60.0)
    for rank in range(world_size):
        ranks.begin(rank, in_rank.come_again, 60.0 if rank == dead else 0.0)
    time.sleep(1)
    os.kill(ranks.processes[dead].pid, signal.SIGKILL)
    died = time.monotonic()
    for rank in others if transport == "shared memory" else others[:1]:
        with pytest.raises(RankDiedError, match=f"^rank {dead} of {world_size} has died: its process has ended"):
            ranks.result(rank)
    assert time.monotonic() - died < 5
    for rank in others:
        os.kill(ranks.processes[rank].pid, signal.SIGKILL)
    ranks.close()
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("tilestream")} == set()


def test_a_rank_killed_while_it_waits_is_named(tmp_path: Path) -> None:
    """All wait for rank 2, which lives and is late; rank 1 dies meanwhile."""
    ranks = Ranks(3, tmp_path)
    ranks.call(in_rank.come_once, "shared memory", 60.0)
    for rank in range(3):
        ranks.begin(rank, in_rank.come_again, 4.0 if rank == 2 else 0.0)
    time.sleep(1)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    for rank in (0, 2):
        with pytest.raises(RankDiedError, match="^rank 1 of 3 has died: its process has ended$"):
            ranks.result(rank)
    ranks.close()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path)
    ranks.call(in_rank.come_once, "shared memory", 0.5)
    for rank in (0, 1):
        ranks.begin(rank, in_rank.come_again, 2.0 * rank)
    for rank in (0, 1):  # the late one hears the same
        with pytest.raises(RankDiedError, match="^rank 1 of 2 did not come to an all-reduce within 500 ms$"):
            ranks.result(rank)
    ranks.close()
