"""allreduce_rmsnorm on the CPU, the ranks being threads of this process; as processes: tests/distributed/test_communicator.py."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tilestream import ops, testing
from tilestream._native import _C
from tilestream.ops import QuantisedRows
from tilestream.ops.allreduce import SIGNAL_BYTES
from tilestream.reference import norm as reference

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MARGIN = 256


@dataclass
class Group:
    """Ranks with a block each, in one process."""

    blocks: list[torch.Tensor]
    tables: list[torch.Tensor]

    @staticmethod
    def of(world_size: int, num_bytes: int, *, timeout_s: float = 20) -> Group:
        blocks = [torch.full((SIGNAL_BYTES + num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(world_size)]  # NaN
        for block in blocks:
            block[:SIGNAL_BYTES] = 0
        addresses = [block.data_ptr() for block in blocks]
        tables = [ops.rank_table(r, addresses, blocks[0].numel(), timeout_s=timeout_s) for r in range(world_size)]
        return Group(blocks, tables)

    def run(self, call) -> None:
        """call(rank) on all ranks at the same time."""
        with ThreadPoolExecutor(len(self.blocks)) as pool:
            for future in [pool.submit(call, rank) for rank in range(len(self.blocks))]:
                future.result()

    def place(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank's tensor in its block, with margins."""
        begin, size = SIGNAL_BYTES + MARGIN, values[0].nbytes
        places = [b[begin : begin + size].view(v.dtype).view(v.shape) for b, v in zip(self.blocks, values, strict=True)]
        return [place.copy_(value) for place, value in zip(places, values, strict=True)]

    def assert_margins(self, num_bytes: int) -> None:
        for block in self.blocks:
            assert bool((block[SIGNAL_BYTES : SIGNAL_BYTES + MARGIN] == 0xFF).all())
            assert bool((block[SIGNAL_BYTES + MARGIN + num_bytes :] == 0xFF).all())


def owned(num_tokens: int, rank: int, world_size: int) -> slice:
    each = -(-num_tokens // world_size)
    return slice(min(rank * each, num_tokens), min((rank + 1) * each, num_tokens))


def make(
    world_size: int, num_tokens: int, hidden: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    x = [torch.randn(num_tokens, hidden).to(dtype) for _ in range(world_size)]
    return x, torch.randn(num_tokens, hidden).to(dtype), (1 + 0.2 * torch.randn(hidden)).to(dtype).float()


def check(world_size: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """With and without residual, and the plain sum: the bound, the bits of the separate ops, every rank's bits."""
    x, residual, weight = make(world_size, num_tokens, hidden, dtype)
    group = Group.of(world_size, 2 * MARGIN + x[0].nbytes)
    exact, plain, total = sum(t.double() for t in x), sum(x[1:], x[0]), sum((t.float() for t in x[1:]), x[0].float())

    places = group.place(x)
    group.run(lambda r: ops.allreduce_rmsnorm(places[r], None, None, group.tables[r]))
    testing.assert_as_good_as_plain(places[0], exact, plain, "sum")
    assert all(torch.equal(place, total.to(dtype)) for place in places)

    places = group.place(x)
    group.run(lambda r: ops.allreduce_rmsnorm(places[r], None, weight, group.tables[r], eps=EPS))
    plain_norm = F.rms_norm(plain, (hidden,), weight.to(dtype), EPS)
    testing.assert_as_good_as_plain(places[0], reference.rms_norm(exact, weight, EPS), plain_norm, "norm")
    assert all(torch.equal(place, ops.rms_norm(total, weight, eps=EPS).to(dtype)) for place in places)

    places = group.place(x)
    residuals = [torch.full_like(residual, float("nan")) for _ in x]  # others' rows are neither read nor written
    for r, own in enumerate(residuals):
        own[owned(num_tokens, r, world_size)] = residual[owned(num_tokens, r, world_size)]
    group.run(lambda r: ops.allreduce_rmsnorm(places[r], residuals[r], weight, group.tables[r], eps=EPS))
    want, want_sum = reference.fused_add_rms_norm(exact, residual, weight, EPS)
    plain_sum = plain + residual
    testing.assert_as_good_as_plain(places[0], want, F.rms_norm(plain_sum, (hidden,), weight.to(dtype), EPS), "x")
    new_residual = (total + residual.float()).to(dtype)
    for r, own in enumerate(residuals):
        rows = owned(num_tokens, r, world_size)
        testing.assert_as_good_as_plain(own[rows], want_sum[rows], plain_sum[rows], "residual")
        assert torch.equal(own[rows], new_residual[rows])
        assert own.isnan().sum() == own.numel() - own[rows].numel()
    assert all(torch.equal(place, ops.rms_norm(new_residual, weight, eps=EPS)) for place in places)
    group.assert_margins(x[0].nbytes)


@each_dtype
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (2, 1), (3, 17), (5, 576), (7, 1000), (33, 4096)])
def test_allreduce_rmsnorm(world_size: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(world_size, num_tokens, hidden, dtype)


@each_dtype
def test_every_simd_level(simd_level: str, dtype: torch.dtype) -> None:
    check(2, 5, 63, dtype)
    check(4, 9, 576, dtype)


def test_threads_of_a_rank(set_num_threads) -> None:
    for num in (1, 2, 3):
        set_num_threads(num)
        check(2, 65, 2048, torch.float32)


def place_rows(group: Group, num_tokens: int, hidden: int, k4: int) -> list[QuantisedRows]:
    """Room for the result of each rank, behind its x."""
    rows = []
    for block in group.blocks:
        begin = SIGNAL_BYTES + MARGIN + num_tokens * hidden * 4
        parts = []
        for like in (QuantisedRows.empty(num_tokens, hidden, k4=k4).q, torch.empty(num_tokens, -(-hidden // 128)),
                     torch.empty(num_tokens, hidden // 32, dtype=torch.int32)):  # fmt: skip
            parts.append(block[begin : begin + like.nbytes].view(like.dtype).view(like.shape))
            begin += -(-like.nbytes // 64) * 64
        rows.append(QuantisedRows(*parts))
    return rows


@each_dtype
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "k4"), [(1, 32, 0), (3, 576, 256), (5, 160, 0), (9, 2048 + 160, 2048), (2, 256, 256)]
)
def test_quantised(world_size: int, num_tokens: int, hidden: int, k4: int, dtype: torch.dtype) -> None:
    """Bit for bit what the separate ops give."""
    x, residual, weight = make(world_size, num_tokens, hidden, dtype)
    group = Group.of(world_size, 4 * MARGIN + 8 * num_tokens * hidden)
    total = sum((t.float() for t in x[1:]), x[0].float())
    for with_residual in (True, False):
        out, places = place_rows(group, num_tokens, hidden, k4), group.place(x)
        residuals = [residual.clone() if with_residual else None for _ in x]
        group.run(lambda r: ops.allreduce_rmsnorm(places[r], residuals[r], weight, group.tables[r], eps=EPS, out=out[r]))  # noqa: B023
        if with_residual:
            want = ops.fused_add_rms_norm_quant(
                torch.zeros_like(residual), (total + residual.float()).to(dtype), weight, eps=EPS, k4=k4
            )
        else:
            want = ops.fused_add_rms_norm_quant(torch.zeros_like(total), total.clone(), weight, eps=EPS, k4=k4)
        for rows in out:
            assert torch.equal(rows.q, want.q) and torch.equal(rows.scale, want.scale) and torch.equal(rows.sum, want.sum)


def test_rows_do_not_depend_on_who_owns_them() -> None:
    x, residual, weight = make(4, 13, 576, torch.bfloat16)

    def result(rows: slice) -> torch.Tensor:
        group = Group.of(4, 2 * MARGIN + x[0].nbytes)
        places = group.place([t[rows].contiguous() for t in x])
        group.run(lambda r: ops.allreduce_rmsnorm(places[r], residual[rows].clone(), weight, group.tables[r], eps=EPS))
        return places[3]

    assert torch.equal(torch.cat([result(slice(t, t + 1)) for t in range(13)]), result(slice(0, 13)))


def test_many_calls_on_the_same_memory() -> None:
    """Different numbers of tokens, and so of owners, one after another; the two channels are independent."""
    group = Group.of(3, 4096)
    place = [block[SIGNAL_BYTES : SIGNAL_BYTES + 64 * 10].view(torch.float32).view(10, 16) for block in group.blocks]
    counts = torch.randint(0, 11, (400,)).tolist()
    sums = [[], [], []]

    def calls(rank: int) -> None:
        for i, num_tokens in enumerate(counts):
            x = place[rank][:num_tokens].fill_(float(i + rank))
            ops.allreduce_rmsnorm(x, None, None, group.tables[rank], channel=i % 3 % 2)
            sums[rank].append((x.amin().item(), x.amax().item()) if num_tokens else None)

    group.run(calls)
    want = [(3.0 * i + 3, 3.0 * i + 3) if num_tokens else None for i, num_tokens in enumerate(counts)]
    assert sums == [want] * 3


def test_a_program_repeats_it() -> None:
    x, residual, weight = make(2, 5, 64, torch.float32)
    group = Group.of(2, 2 * MARGIN + x[0].nbytes)
    places = group.place(x)
    programs, residuals = [_C.Program(), _C.Program()], [residual.clone(), residual.clone()]

    def record(rank: int) -> None:
        programs[rank].begin()
        ops.allreduce_rmsnorm(places[rank], residuals[rank], weight, group.tables[rank], eps=EPS)
        programs[rank].end()

    group.run(record)
    first = places[0].clone()
    for num_runs in (1, 2):
        group.place(x)
        for r in residuals:
            r.copy_(residual)
        group.run(lambda r: programs[r].run())
        assert torch.equal(places[0], first) and torch.equal(places[1], first), num_runs


def test_a_rank_that_does_not_come_is_named() -> None:
    group = Group.of(3, 4096, timeout_s=0.3)
    place = [block[SIGNAL_BYTES:].view(torch.float32).view(1, -1) for block in group.blocks]
    message = "^rank 1 of 3 did not come to an all-reduce within 300 ms$"

    def call(rank: int) -> None:
        for _ in range(1 + (rank == 2)):  # once more: no wait any more
            with pytest.raises(RuntimeError, match=message):
                ops.allreduce_rmsnorm(place[rank], None, None, group.tables[rank])

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(call, 2)  # for rank 0, who owns the token
        time.sleep(0.05)
        for future in (pool.submit(call, 0), waiting):
            future.result(timeout=10)
    with pytest.raises(RuntimeError, match=message):  # late
        ops.allreduce_rmsnorm(place[1], None, None, group.tables[1])


def single(**change: object) -> dict:
    """A good call of one rank, but for `change`."""
    group = Group.of(1, 8192)
    memory = group.blocks[0][SIGNAL_BYTES:]
    arguments = {
        "x": memory[:768].view(torch.float32).view(3, 64),
        "residual": torch.zeros(3, 64),
        "weight": torch.ones(64),
        "q": memory[1024 : 1024 + 192].view(torch.int8).view(3, 64),
        "scale": memory[2048 : 2048 + 12].view(torch.float32).view(3, 1),
        "sum": memory[3072 : 3072 + 24].view(torch.int32).view(3, 2),
        "host_ranks": group.tables[0],
        "channel": 0,
        "keep": group,
    }
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return arguments


def call(arguments: dict) -> None:
    torch.ops.tilestream.allreduce_rmsnorm(
        *(arguments[name] for name in ("x", "residual", "weight", "q", "scale", "sum", "host_ranks")),
        eps=EPS, channel=arguments["channel"],
    )  # fmt: skip


def test_opcheck() -> None:
    """On no tokens: it calls the op on copies, which are not in the block."""
    good = single()
    arguments = tuple(good[name][:0] for name in ("x", "residual")) + (good["weight"],)
    arguments += tuple(good[name][:0] for name in ("q", "scale", "sum")) + (good["host_ranks"],)
    torch.library.opcheck(torch.ops.tilestream.allreduce_rmsnorm.default, arguments, {"eps": EPS})


def with_field(index: int, value: int):
    return lambda table: table.index_fill(0, torch.tensor([index]), value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda x: x.double()}, TypeError, "x has dtype Double; supported: Float, Half, BFloat16"),
        ({"x": lambda x: x[0]}, ValueError, r"x has 1 dimensions \[64\]; it needs 2"),
        ({"x": lambda x: x[:, :32]}, ValueError, r"x has strides \[64, 1\] for shape \[3, 32\]; it must be contiguous"),
        ({"x": lambda x: x.clone()}, ValueError, r"x is at byte -?\d+ of this rank's block; allowed: from 65536"),
        ({"x": lambda x: x.view(-1)[1:65].view(1, 64)}, ValueError, "x is at byte 65540 of this rank's block; it must be a multiple of 16"),
        ({"residual": torch.zeros(3, 63)}, ValueError, r"residual has shape \[3, 63\]; it must be that of x, \[3, 64\]"),
        ({"residual": torch.zeros(3, 64).half()}, TypeError, "residual has dtype Half; it must be Float as x"),
        ({"weight": torch.ones(63)}, ValueError, r"weight has shape \[63\]; dimension 0 must be 64"),
        ({"weight": torch.ones(64).half()}, TypeError, "weight has dtype Half; supported: Float"),
        ({"weight": None}, ValueError, "there is a residual but no weight; a plain all-reduce has neither"),
        ({"weight": None, "residual": None}, ValueError, "there is a q but no weight; a plain all-reduce has neither"),
        ({"scale": None}, ValueError, "of q, scale and sum some are None; give all three or none"),
        ({"q": lambda q: q.clone()}, ValueError, "q is at byte -?[0-9]+ of this rank's block"),
        ({"sum": lambda s: s.clone()}, ValueError, "sum is at byte -?[0-9]+ of this rank's block"),
        ({"q": lambda q: q[:, :33]}, ValueError, r"q has strides \[64, 1\] for shape \[3, 33\]; it must be contiguous"),
        ({"channel": 2}, ValueError, "channel is 2; allowed: 0 to 1"),
        ({"host_ranks": lambda t: t.int()}, TypeError, "host_ranks has dtype Int; supported: Long"),
        ({"host_ranks": lambda t: t[:5]}, ValueError, r"host_ranks has shape \[5\]; it needs 5 numbers and the addresses of 1 to 8 ranks"),
        ({"host_ranks": with_field(0, 1)}, ValueError, "rank is 1; allowed: 0 to 0"),
        ({"host_ranks": with_field(1, 2)}, ValueError, "host_ranks names a world_size of 2 but 1 addresses"),
        ({"host_ranks": with_field(3, 0)}, ValueError, "timeout_ms is 0; allowed: 1 to 2147483647"),
        ({"host_ranks": with_field(4, 1000)}, ValueError, "a rank's block has 1000 bytes; it needs at least 65536"),
        ({"host_ranks": with_field(5, 0)}, ValueError, "the address of rank 0's block is 0"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(single(**change))
