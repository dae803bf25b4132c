"""Several ranks on the emulator, each with a stream of calls of the package's kernels: cuda::allreduce_rmsnorm and rms_norm."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

import torch

from tests.simt import build

# csrc/include/tilestream/allreduce.h, types.h
MAX_RANKS, SIGNAL_BYTES, FAULT_OFFSET = 8, 64 * 1024, 64 * 1024 - 4
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# csrc/cuda/allreduce_barrier.cuh: words of the signals of one channel
MAX_BLOCKS = 16
FROM_WORDS, PAST_WORDS = MAX_BLOCKS * MAX_RANKS, MAX_BLOCKS


class Ranks(ctypes.Structure):
    _fields_ = [("rank", c_int32), ("world_size", c_int32), ("memory", c_void_p * MAX_RANKS), ("multicast", c_void_p),
                ("channel", c_int32), ("timeout_ms", c_int32)]  # fmt: skip


class AllReduceRmsNorm(ctypes.Structure):
    _fields_ = [("ranks", Ranks), ("x", c_int64), ("residual", c_void_p), ("weight", c_void_p), ("q", c_int64), ("scale", c_int64),
                ("sum", c_int64), ("k4", c_int64), ("num_tokens", c_int64), ("hidden", c_int64), ("residual_row_stride", c_int64),
                ("eps", c_float), ("dtype", c_int32)]  # fmt: skip
    op = b"allreduce_rmsnorm"


class QuantisedRows(ctypes.Structure):
    _fields_ = [("q", c_void_p), ("scale", c_void_p), ("sum", c_void_p), ("k4", c_int64)]


class RmsNorm(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("residual", c_void_p), ("weight", c_void_p), ("out", c_void_p), ("quantised", QuantisedRows),
                ("outer", c_int64), ("inner", c_int64), ("hidden", c_int64),
                ("x_outer_stride", c_int64), ("x_inner_stride", c_int64), ("residual_outer_stride", c_int64),
                ("residual_inner_stride", c_int64), ("out_outer_stride", c_int64), ("out_inner_stride", c_int64),
                ("eps", c_float), ("dtype", c_int32)]  # fmt: skip
    op = b"rms_norm"


class _Call(ctypes.Structure):
    _fields_ = [("op", c_char_p), ("params", c_void_p)]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, out: int, eps: float) -> RmsNorm:
    """The rows of x, contiguous, normed to the address `out`."""
    rows, hidden = x.shape
    return RmsNorm(x=x.data_ptr(), weight=weight.data_ptr(), out=out, outer=rows, inner=1, hidden=hidden, x_outer_stride=hidden,
                   out_outer_stride=hidden, eps=eps, dtype=DTYPES[x.dtype])  # fmt: skip


def run(streams: list[list[ctypes.Structure]], seed: int) -> str:
    """Runs the calls of each stream in order, all streams at once. The report of what was wrong, or "" if nothing was."""
    library = build.ops()
    library.tilestream_simt_run_ranks.restype = c_char_p
    library.tilestream_simt_run_ranks.argtypes = [c_void_p, c_int, c_int]
    library.tilestream_simt_set_seed(seed)
    (num_calls,) = {len(stream) for stream in streams}
    calls = [_Call(call.op, ctypes.addressof(call)) for stream in streams for call in stream]
    return library.tilestream_simt_run_ranks((_Call * len(calls))(*calls), len(streams), num_calls).decode()


class SymmetricMemory:
    """The ranks' blocks of it, uninitialised but for the signals, which are zero.

    Attributes:
        blocks: [world_size, num_bytes], uint8, 64-byte aligned.
    """

    def __init__(self, world_size: int, num_bytes: int, *, multicast: bool) -> None:
        row_bytes = -(-num_bytes // 64) * 64
        whole = torch.full((world_size * row_bytes + 64,), 0xFF, dtype=torch.uint8)
        self.blocks = whole[-whole.data_ptr() % 64 :][: world_size * row_bytes].view(world_size, row_bytes)
        self.blocks[:, :SIGNAL_BYTES] = 0
        self.world_size, self._multicast = world_size, None
        if multicast:
            library = build.ops()
            library.tilestream_simt_make_multicast.restype = c_void_p
            library.tilestream_simt_make_multicast.argtypes = [c_void_p, c_int, c_size_t]
            library.tilestream_simt_free_multicast.argtypes = [c_void_p]
            addresses = (c_void_p * world_size)(*(block.data_ptr() for block in self.blocks))
            self._multicast = library.tilestream_simt_make_multicast(addresses, world_size, row_bytes)

    def close(self) -> None:
        if self._multicast is not None:
            build.ops().tilestream_simt_free_multicast(self._multicast)

    def ranks(self, rank: int, *, channel: int = 0, timeout_ms: int = 10_000) -> Ranks:
        """As `rank` sees them."""
        addresses = (c_void_p * MAX_RANKS)(*(block.data_ptr() for block in self.blocks))
        return Ranks(rank, self.world_size, addresses, self._multicast, channel, timeout_ms)

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in that rank's block."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self.blocks[rank, offset : offset + num_bytes].view(dtype).view(shape)

    def signals(self, rank: int, channel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the blocks of each rank have told: [MAX_BLOCKS, MAX_RANKS]; how far this rank's own were: [MAX_BLOCKS]. int32."""
        words = self.view(rank, 4 * channel * (FROM_WORDS + PAST_WORDS), (FROM_WORDS + PAST_WORDS,), torch.int32)
        return words[:FROM_WORDS].view(MAX_BLOCKS, MAX_RANKS), words[FROM_WORDS:]

    def faults(self) -> list[int]:
        """By rank: one more than the rank that it has given up, or 0."""
        return [int(self.view(rank, FAULT_OFFSET, (1,), torch.int32)) for rank in range(self.world_size)]
