"""cuda::allreduce_rmsnorm with several ranks on the emulator: peer pointers and multimem, faults, and two streams at once."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from tests.simt import build, rank_calls
from tests.simt.rank_calls import SIGNAL_BYTES, AllReduceRmsNorm, SymmetricMemory, rms_norm
from tilestream import ops, testing
from tilestream._native import _C
from tilestream.ops import QuantisedRows
from tilestream.reference import norm as reference

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_seed = pytest.mark.parametrize("seed", range(3))
each_world = pytest.mark.parametrize("world_size", [2, 4, 8])
each_transport = pytest.mark.parametrize("multicast", [False, True], ids=["peer", "multimem"])


@dataclasses.dataclass
class Group:
    """Ranks with room for x and its quantised rows, and the calls that each of them is to make."""

    memory: SymmetricMemory
    num_tokens: int  # at most
    hidden: int
    dtype: torch.dtype
    channel: int = 0
    timeout_ms: int = 10_000

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.close()

    def __post_init__(self) -> None:
        self.streams: list[list[ctypes.Structure]] = [[] for _ in range(self.memory.world_size)]
        self.kept: list[object] = []  # tensors that calls point to
        self.x = SIGNAL_BYTES + self.channel * self.room(self.num_tokens, self.hidden)
        self.q = self.x + 4 * self.num_tokens * self.hidden
        self.scale = self.q + self.num_tokens * self.hidden
        self.sum = self.scale + self.num_tokens * self.hidden

    @staticmethod
    def room(num_tokens: int, hidden: int) -> int:
        return -(-num_tokens * hidden // 16) * 16 * 8

    def owned(self, rank: int, num_tokens: int) -> slice:
        each = -(-num_tokens // self.memory.world_size)
        return slice(min(rank * each, num_tokens), min((rank + 1) * each, num_tokens))

    def tokens(self, rank: int, num_tokens: int) -> torch.Tensor:
        """x, or the result, on that rank."""
        return self.memory.view(rank, self.x, (num_tokens, self.hidden), self.dtype)

    def rows(self, rank: int, num_tokens: int, k4: int) -> QuantisedRows:
        shapes = {"q": (self.hidden - k4 // 2, torch.int8), "scale": (-(-self.hidden // 128), torch.float32),
                  "sum": (self.hidden // 32, torch.int32)}  # fmt: skip
        return QuantisedRows(*(self.memory.view(rank, getattr(self, name), (num_tokens, size), dtype)
                               for name, (size, dtype) in shapes.items()))  # fmt: skip

    def fill(self, sources: torch.Tensor, offset: int | None = None) -> None:
        """A kernel of each rank writes its x, as a linear would: filled(sources), [world_size, num_tokens, hidden]."""
        sources = in_rows(sources)
        ones = torch.ones(sources.shape[-1])
        self.kept += [sources, ones]
        for rank, stream in enumerate(self.streams):
            to = self.memory.blocks[rank].data_ptr() + (self.x if offset is None else offset)
            stream.append(rms_norm(sources[rank], ones, to, EPS))

    def reduce(self, num_tokens: int, weight: torch.Tensor | None, residual: torch.Tensor | None = None, *,
               quantised: bool = False, k4: int = 0) -> list[torch.Tensor]:  # fmt: skip
        """The op on each rank. Returns the ranks' residuals, of which each has its own tokens alone, and NaN elsewhere."""
        residuals = []
        for rank, stream in enumerate(self.streams):
            call = AllReduceRmsNorm(ranks=self.memory.ranks(rank, channel=self.channel, timeout_ms=self.timeout_ms), x=self.x,
                                    q=self.q if quantised else -1, scale=self.scale, sum=self.sum, k4=k4, num_tokens=num_tokens,
                                    hidden=self.hidden, eps=EPS, dtype=rank_calls.DTYPES[self.dtype])  # fmt: skip
            if weight is not None:
                call.weight = weight.data_ptr()
            if residual is not None:
                own = torch.full((num_tokens, self.hidden + 16), float("nan"), dtype=self.dtype)
                own[self.owned(rank, num_tokens), : self.hidden] = residual[self.owned(rank, num_tokens)]
                residuals.append(own)
                call.residual, call.residual_row_stride = own.data_ptr(), own.stride(0)
            stream.append(call)
        self.kept += [weight, residuals]
        return residuals

    def check_residuals(self, residuals: list[torch.Tensor], want: torch.Tensor, plain: torch.Tensor) -> None:
        """Each rank has its own tokens' sum, and has written nothing else."""
        for rank, residual in enumerate(residuals):
            own = self.owned(rank, len(want))
            testing.assert_as_good_as_plain(residual[own, : self.hidden], want[own], plain[own], f"residual of rank {rank}")
            residual[own, : self.hidden] = float("nan")
            assert residual.isnan().all()

    def results(self, num_tokens: int) -> torch.Tensor:
        """The result, which is the same on all ranks."""
        first = self.tokens(0, num_tokens).clone()
        for rank in range(1, self.memory.world_size):
            assert torch.equal(self.tokens(rank, num_tokens), first), f"rank {rank} has another result than rank 0"
        return first


def make_group(world_size: int, num_tokens: int, hidden: int, dtype: torch.dtype, *, multicast: bool, **others: int) -> Group:
    num_bytes = SIGNAL_BYTES + 2 * Group.room(num_tokens, hidden) + num_tokens * hidden * 8
    return Group(SymmetricMemory(world_size, num_bytes, multicast=multicast), num_tokens, hidden, dtype, **others)


def make_sources(group: Group, num_tokens: int) -> torch.Tensor:
    return torch.randn(group.memory.world_size, num_tokens, group.hidden).to(group.dtype)


def on_emulator(run, *arguments, **options):
    """An op by its CUDA kernel."""
    before = _C.simd_level()
    build.ops().tilestream_simt_set_seed(0)
    _C.set_simd_level("simt")
    try:
        return run(*arguments, **options)
    finally:
        _C.set_simd_level(before)


def in_rows(sources: torch.Tensor) -> torch.Tensor:
    """The same elements in as few rows as have a warp each: less work for the emulator."""
    return sources.view(len(sources), -1, 1024) if sources[0].numel() % 1024 == 0 else sources


def filled(sources: torch.Tensor) -> torch.Tensor:
    """What Group.fill writes."""
    rows = in_rows(sources)
    return on_emulator(ops.rms_norm, rows, torch.ones(rows.shape[-1]), eps=EPS).view(sources.shape)


def make_weight(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return (1 + 0.2 * torch.randn(hidden)).to(dtype).float()


def sums(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the ranks, and the residual: in float64, and by plain torch in x's dtype."""
    plain = x[0].clone()
    for part in x[1:]:
        plain += part
    want = x.double().sum(0)
    return (want, plain) if residual is None else (want + residual.double(), plain + residual)


def check(group: Group, num_tokens_of_calls: list[int], seed: int, *, with_residual: bool) -> None:
    """One call behind the other on the same buffers; the last one's result stands in them."""
    weight = make_weight(group.hidden, group.dtype)
    calls = []
    for num_tokens in num_tokens_of_calls:
        sources = make_sources(group, num_tokens)
        residual = torch.randn(num_tokens, group.hidden).to(group.dtype) if with_residual else None
        group.fill(sources)
        calls.append((sources, residual, group.reduce(num_tokens, weight, residual)))
    assert rank_calls.run(group.streams, seed) == ""
    assert group.memory.faults() == [0] * group.memory.world_size
    behind = group.memory.blocks[:, group.x + max(num_tokens_of_calls) * group.hidden * group.dtype.itemsize :]
    assert bool((behind == 0xFF).all()), "something was written behind x"
    for sources, residual, residuals in calls:
        want, plain = sums(filled(sources), residual)
        group.check_residuals(residuals, want, plain)
    got = group.results(num_tokens_of_calls[-1])
    plain = F.rms_norm(plain, (group.hidden,), weight.to(group.dtype), EPS)
    testing.assert_as_good_as_plain(got, reference.rms_norm(want, weight, EPS), plain)


@each_seed
@each_dtype
@each_transport
@each_world
def test_against_float64(world_size: int, multicast: bool, dtype: torch.dtype, seed: int) -> None:
    """Rows of a warp, not of whole vectors, of 256 threads, and longer than these hold; one token and odd numbers of them."""
    longest = 4096 * 8 // dtype.itemsize + 264
    for i, (hidden, num_tokens) in enumerate(((64, [1, 33]), (1003, [5, world_size - 1]), (1536, [9]), (longest, [1]))):
        with make_group(world_size, max(num_tokens), hidden, dtype, multicast=multicast) as group:
            check(group, num_tokens, seed, with_residual=(i + seed) % 2 == 0)


@each_seed
@each_transport
@pytest.mark.parametrize("world_size", [2, 8])
def test_many_tokens(world_size: int, multicast: bool, seed: int) -> None:
    """A warp walks many rows; blocks that the call before did not have are as far as on the other ranks."""
    with make_group(world_size, 4096, 32, torch.bfloat16, multicast=multicast) as group:
        check(group, [world_size + 1, 4096], seed, with_residual=True)


@each_transport
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_plain_all_reduce(world_size: int, multicast: bool) -> None:
    for dtype, num_tokens, hidden in ((torch.float16, 5, 520), (torch.bfloat16, 3, 2048), (torch.float32, 2, 33)):
        with make_group(world_size, num_tokens, hidden, dtype, multicast=multicast) as group:
            sources = make_sources(group, num_tokens)
            group.fill(sources)
            group.reduce(num_tokens, None)
            assert rank_calls.run(group.streams, 2) == ""
            testing.assert_as_good_as_plain(group.results(num_tokens), *sums(filled(sources), None))


@each_dtype
@each_world
def test_no_schedule_changes_a_bit(world_size: int, dtype: torch.dtype) -> None:
    """With peer pointers; of how the switch adds nothing is promised."""
    sources, residual = torch.randn(world_size, 7, 1600).to(dtype), torch.randn(7, 1600).to(dtype)
    weight = make_weight(1600, dtype)
    results = []
    for seed in range(3):
        with make_group(world_size, 7, 1600, dtype, multicast=False) as group:
            group.fill(sources)
            group.reduce(7, weight, residual)
            assert rank_calls.run(group.streams, seed) == ""
            results.append(group.results(7))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_transport
@each_dtype
@pytest.mark.parametrize("hidden", [96, 1024, 4096])
def test_has_the_bits_of_the_norm_alone(hidden: int, dtype: torch.dtype, multicast: bool) -> None:
    """Where all ranks but one bring zeros the sum is exact: then the norm's and the quantised rows' bits are those of the ops
    that work on one GPU."""
    num_tokens = 3
    sources, residual = torch.randn(4, num_tokens, hidden).to(dtype), torch.randn(num_tokens, hidden).to(dtype)
    weight = make_weight(hidden, dtype)
    sources[[0, 1, 3]] = 0
    normed, total = filled(sources)[2], residual.clone()
    for k4 in {None, 0, hidden // 2 // 128 * 128}:
        with make_group(4, num_tokens, hidden, dtype, multicast=multicast) as group:
            group.fill(sources)
            group.reduce(num_tokens, weight, residual, quantised=k4 is not None, k4=k4 or 0)
            assert rank_calls.run(group.streams, 2) == ""
            if k4 is None:
                want, of_want = normed.clone(), residual.clone()
                on_emulator(ops.fused_add_rms_norm, want, of_want, weight, eps=EPS)
                assert torch.equal(group.results(num_tokens), want)
                continue
            want = on_emulator(ops.fused_add_rms_norm_quant, normed, total.clone(), weight, eps=EPS, k4=k4)
            for rank in range(4):
                got = group.rows(rank, num_tokens, k4)
                assert torch.equal(got.q, want.q) and torch.equal(got.scale, want.scale) and torch.equal(got.sum, want.sum)


@each_seed
@each_transport
@each_world
def test_quantised_rows(world_size: int, multicast: bool, seed: int) -> None:
    """Those that quantising the float32 result gives; with INT4 blocks, and without a residual."""
    num_tokens, hidden = 2 * world_size + 1, 576
    sources, weight = torch.randn(world_size, num_tokens, hidden), make_weight(hidden, torch.float32)
    for k4 in (0, 256):
        with make_group(world_size, num_tokens, hidden, torch.float32, multicast=multicast) as group:
            group.fill(sources)
            group.reduce(num_tokens, weight, quantised=True, k4=k4)
            group.fill(sources)
            group.reduce(num_tokens, weight)
            assert rank_calls.run(group.streams, seed) == ""
            want = on_emulator(ops.quantise, group.results(num_tokens), k4=k4)
            for rank in range(world_size):
                got = group.rows(rank, num_tokens, k4)
                assert torch.equal(got.q, want.q) and torch.equal(got.scale, want.scale) and torch.equal(got.sum, want.sum)


@each_seed
@each_transport
@each_world
def test_two_streams_at_once(world_size: int, multicast: bool, seed: int) -> None:
    """The halves of a split step: each on its channel, with its own x, several calls each."""
    hidden, halves = 136, (5, 9)
    with make_group(world_size, max(halves), hidden, torch.bfloat16, multicast=multicast) as first:
        second = dataclasses.replace(first, channel=1)
        wanted = []
        for group, num_tokens in zip((first, second), halves):
            weight = make_weight(hidden, torch.bfloat16)
            for _ in range(3):
                sources = make_sources(group, num_tokens)
                group.fill(sources)
                group.reduce(num_tokens, weight)
            wanted.append((group, sources, weight))
        assert rank_calls.run(first.streams + second.streams, seed) == ""
        for group, sources, weight in wanted:
            want, plain = sums(filled(sources), None)
            plain = F.rms_norm(plain, (hidden,), weight.bfloat16(), EPS)
            testing.assert_as_good_as_plain(group.results(sources.shape[1]), reference.rms_norm(want, weight, EPS), plain)


def twice(group: Group, num_tokens: int) -> None:
    """Two calls, to which the last rank comes late."""
    for _ in range(5):
        group.fill(make_sources(group, num_tokens), group.q)
    others, group.streams = group.streams, [[] for _ in group.streams]
    for _ in range(2):
        group.fill(make_sources(group, num_tokens))
        group.reduce(num_tokens, make_weight(group.hidden, group.dtype), torch.randn(num_tokens, group.hidden).to(group.dtype))
    *early, late = zip(group.streams, others)
    group.streams = [calls + other for calls, other in early] + [late[1] + late[0]]


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILESTREAM_SIMT_GLOBAL_RACES", "1")


@each_seed
@each_transport
@each_world
def test_no_race(world_size: int, multicast: bool, seed: int, races: None) -> None:
    with make_group(world_size, 19, 72, torch.float16, multicast=multicast) as group:
        twice(group, 19)
        assert rank_calls.run(group.streams, seed) == ""


@each_seed
@each_transport
@each_world
def test_missing_barrier_is_a_race(world_size: int, multicast: bool, seed: int, races: None) -> None:
    """Ranks that seem to be far ahead: nobody waits for the last."""
    with make_group(world_size, 19, 72, torch.float16, multicast=multicast) as group:
        for rank in range(world_size):
            group.memory.signals(rank, 0)[0].fill_(1000)
        twice(group, 19)
        report = rank_calls.run(group.streams, seed)
    assert re.search(
        r"race in global memory: .* by block \(\d+,0,0\) of rank \d at .*, with no release and acquire between", report
    )


def lose_signals(group: Group, rank: int) -> None:
    """As if all others had lost signals of that rank's block 0: what it tells is behind what they wait for."""
    group.memory.signals(rank, 0)[1][0] = -1000


@each_seed
@each_transport
@each_world
def test_lost_signal_is_a_timeout(world_size: int, multicast: bool, seed: int) -> None:
    """Every other rank names the one whose signals are missing, and its later calls neither wait nor touch anything."""
    lost = seed % world_size
    with make_group(world_size, 3, 64, torch.bfloat16, multicast=multicast) as group:
        lose_signals(group, lost)
        twice(group, 3)
        last = group.kept[-4]
        assert rank_calls.run(group.streams, seed) == ""
        faults = group.memory.faults()
        assert all(fault == lost + 1 for rank, fault in enumerate(faults) if rank != lost)
        of_others = torch.ones(3, dtype=torch.bool)
        of_others[group.owned(lost, 3)] = False
        for rank in range(world_size):
            assert torch.equal(group.tokens(rank, 3)[of_others], filled(last)[rank, of_others])


@each_seed
@each_world
def test_absent_rank_is_a_timeout(world_size: int, seed: int) -> None:
    """A rank that never launches."""
    absent = (seed + 1) % world_size
    with make_group(world_size, 3, 64, torch.bfloat16, multicast=False) as group:
        sources = make_sources(group, 3)
        group.fill(sources)
        group.reduce(3, make_weight(64, torch.bfloat16))
        group.streams[absent][1] = group.streams[absent][0]
        assert rank_calls.run(group.streams, seed) == ""
        assert all(fault == absent + 1 for rank, fault in enumerate(group.memory.faults()) if rank != absent)


def test_without_a_timeout_it_is_a_deadlock() -> None:
    with make_group(4, 3, 64, torch.bfloat16, multicast=False, timeout_ms=2**31 - 1) as group:
        lose_signals(group, 2)
        twice(group, 3)
        report = rank_calls.run(group.streams, 2)
    for rank in (0, 1, 3):
        assert f"by rank {rank}\n" in report
    assert "deadlock, the threads that still run only poll, in the launch of allreduce.cu" in report
    assert "wait in ld.acquire.sys at allreduce_barrier.cuh" in report
