"""What the rank processes of these tests do: test_communicator.py says when."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable

import pytest
import torch

from tilestream import ops
from tilestream._native import _C
from tilestream.distributed import Communicator, communicator, connect, shared_memory
from tilestream.distributed.probe import Member
from tilestream.ops import QuantisedRows
from tilestream.placement import CPU

EPS = 1e-5
HIDDEN = 576
MODES = ("sum", "norm", "residual", "int8", "int4")
_open: dict[str, Communicator] = {}


def opened(transport: str) -> Communicator:
    if transport not in _open:
        _open[transport] = connect(None, CPU, num_bytes=8 << 20, transport=transport)
    return _open[transport]


def values(world_size: int, num_tokens: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """All ranks' x, the residual, the weight: the same in every process."""
    torch.manual_seed(num_tokens)
    x = [torch.randn(num_tokens, HIDDEN).to(dtype) for _ in range(world_size)]
    return x, torch.randn(num_tokens, HIDDEN).to(dtype), (1 + 0.2 * torch.randn(HIDDEN)).to(dtype).float()


def room(ranks: Communicator, num_tokens: int, k4: int) -> QuantisedRows:
    like = QuantisedRows.empty(num_tokens, HIDDEN, k4=k4)
    parts = [ranks.empty(t.nbytes).view(t.dtype).view(t.shape) for t in (like.q, like.scale, like.sum)]
    return QuantisedRows(*parts)


def reduce(rank: int, transport: str, num_tokens: int, dtype: torch.dtype) -> dict:
    """Of each mode: the result and the residual, the call made three times."""
    ranks = opened(transport)
    x, residual, weight = values(ranks.world_size, num_tokens, dtype)
    place = ranks.empty(x[0].nbytes).view(dtype).view(x[0].shape)
    found = {}
    for mode in MODES:
        out = room(ranks, num_tokens, {"int8": 0, "int4": 256}[mode]) if mode.startswith("int") else None
        for _ in range(3):
            place.copy_(x[rank])
            own = None if mode in ("sum", "norm") else residual.clone()
            ranks.allreduce_rmsnorm(place, own, None if mode == "sum" else weight, eps=EPS, int8=out)
            result = [place.clone()] if out is None else [out.q.clone(), out.scale.clone(), out.sum.clone()]
            assert mode not in found or all(map(torch.equal, result, found[mode][0])), "another result the second time"
            found[mode] = (result, own)
    return found


def gather_all(rank: int, transport: str) -> None:
    ranks = opened(transport)
    shapes = [(), (1,), (3, 5), (0,), (2, 20_000), (7, 33_333)]  # the last: more than fits at a time
    for _ in range(3):
        for shape in shapes:
            for dtype in (torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.uint8):
                torch.manual_seed(len(shape))
                every = torch.randint(0, 100, (ranks.world_size, *shape)).to(dtype)
                got = ranks.all_gather(every[rank].clone())
                assert got.dtype == dtype and torch.equal(got, every)


def use_memory(rank: int) -> list[int]:
    ranks = connect(None, CPU, num_bytes=1000, transport="shared memory")
    begin = ranks.empty(1).data_ptr()
    found = [ranks.empty(100), ranks.empty(64), ranks.empty(1)]
    with pytest.raises(MemoryError, match="10000 bytes of symmetric memory are asked for, but [0-9]+ of [0-9]+ are left"):
        ranks.empty(10_000)
    ranks.close()
    found[0].fill_(rank)  # memory stays with its tensors
    assert all(t.data_ptr() % 64 == 0 and t.dtype == torch.uint8 for t in found)
    return [t.data_ptr() - begin for t in found] + [t.numel() for t in found]


def reduce_ordinary_memory(rank: int) -> None:
    ranks = opened("shared memory")
    for num_tokens in (3, 9, 2):
        x, residual, weight = values(ranks.world_size, num_tokens, torch.float32)
        want = sum(x[1:], x[0])
        ranks.allreduce_rmsnorm(x[rank], None, None, eps=EPS)
        assert torch.equal(x[rank], want)


def replay(rank: int) -> None:
    ranks = opened("shared memory")
    x, residual, weight = values(ranks.world_size, 5, torch.float32)
    place, own = ranks.empty(x[0].nbytes).view(torch.float32).view(5, HIDDEN), residual.clone()
    program = _C.Program()
    program.begin()
    ranks.allreduce_rmsnorm(place, own, weight, eps=EPS)
    program.end()
    place.copy_(x[rank]), own.copy_(residual)
    program.run()
    assert torch.equal(place, ops.rms_norm(sum(x[1:], x[0]) + residual, weight, eps=EPS))


def open_spoilt(rank: int, spoil: Callable[[int, pytest.MonkeyPatch], None], transport: str) -> tuple[str, str, float]:
    """Transport, log and sum where `spoil` was at work."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    communicator.logger.addHandler(handler)
    communicator.logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        spoil(rank, patch)
        ranks = connect(None, CPU, num_bytes=4096, transport=transport)
    communicator.logger.removeHandler(handler)
    x = torch.full((1, 4), 1.0 + rank)
    ranks.allreduce_rmsnorm(x, None, None, eps=EPS)
    return ranks.transport, " | ".join(record.getMessage() for record in records), x[0, 0].item()


def nothing(rank: int, patch: pytest.MonkeyPatch) -> None:
    pass


def refuse(*_: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_memory_on_rank_1(rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 1:
        patch.setattr(os, "posix_fallocate", refuse)


def another_host_on_rank_1(rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 1:
        patch.setattr(Member, "this", lambda: Member("another boot", "far", os.getpid()))


def closed_proc(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_memory, "_anonymous_file", lambda: (os.memfd_create("tilestream"), "/proc/0/fd/3"))


def another_file_on_rank_1(rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 1:
        opens = os.open
        patch.setattr(os, "open", lambda path, flags: opens("/dev/null", flags))


def no_files_on_rank_0(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_memory, "_anonymous_file", refuse)
    patch.setattr(shared_memory, "_named_file", refuse)


def come_once(rank: int, transport: str, timeout_s: float) -> None:
    """A first call of all ranks."""
    _open["new"] = connect(None, CPU, num_bytes=1 << 20, timeout_s=timeout_s, transport=transport)
    _open["new"].allreduce_rmsnorm(torch.zeros(16, 64), None, None, eps=EPS)


def come_again(rank: int, pause_s: float) -> None:
    """Later than the others: they wait in the kernel by then."""
    time.sleep(pause_s)
    _open["new"].allreduce_rmsnorm(torch.zeros(16, 64), None, None, eps=EPS)
