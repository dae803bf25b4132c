"""What the weight loader needs of a file format: tensors by one set of names, as rows of blocks or as integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tilestream.ops.linear import PackedFormat, interleave_gate_up

_GROUP_K, _SCALE_K = 32, 128  # of csrc/include/tilestream/quantise.h: what k and k4 are multiples of


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A weight as it lies in its file.

    Attributes:
        type: GGUF block type; plain float types are blocks of one element.
        rows: uint8 [num_rows, bytes per row].
        num_columns: elements per row.
        skip: elements at the start of a row's first block that are not the weight's.
    """

    type: GGMLQuantizationType
    rows: torch.Tensor
    num_columns: int
    skip: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.rows.numel()

    @property
    def block(self) -> int:
        """Columns that stay together: K-quants have scales for each 32 or less."""
        return min(GGML_QUANT_SIZES[self.type][0], _GROUP_K)

    @property
    def values(self) -> torch.Tensor:
        """[num_rows, num_columns] float32."""
        return torch.from_numpy(dequantize(self.rows.numpy(), self.type))[:, self.skip : self.skip + self.num_columns]

    def part(self, rows: range, columns: range) -> RawTensor:
        """These rows and columns, in the same memory."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        begin, end = self.skip + columns.start, self.skip + columns.stop
        bounds = slice(begin // block * block_bytes, -(-end // block) * block_bytes)
        return RawTensor(self.type, self.rows[rows.start : rows.stop, bounds], len(columns), begin % block)

    def interleaved(self, up: RawTensor) -> RawTensor:
        """This gate's rows and those of `up`, of the same type, in turn."""
        # By numpy: torch's threads, which would then spin, take longer than the copy.
        in_turn = np.stack([self.rows.numpy(), up.rows.numpy()], 1)
        return replace(self, rows=torch.from_numpy(in_turn).flatten(0, 1))


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A weight whose integers stand apart from their scales: q * scale + zero.

    Attributes:
        q: uint8 [num_rows, num_columns].
        scale: float32 [num_rows, ceil(num_columns / group)].
        zero: as scale; None: -8 * scale (4 bits) or -128 * scale (8).
        group: consecutive columns that share a scale; num_columns, or a multiple of 32.
        bits: 4 or 8.
        k4: how many leading columns may meet INT4 activations.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    bits: int
    k4: int = 0

    @property
    def num_rows(self) -> int:
        return self.q.shape[0]

    @property
    def num_columns(self) -> int:
        return self.q.shape[1]

    @property
    def num_bytes(self) -> int:
        """In the file, nearly."""
        return self.q.numel() * self.bits // 8

    @property
    def block(self) -> int:
        """Columns that stay together."""
        return _GROUP_K

    def part(self, rows: range, columns: range) -> QuantisedTensor:
        """These rows and columns, whole blocks. Where a cut falls inside a group, groups become finer."""
        begin, end, lines = columns.start, columns.stop, slice(rows.start, rows.stop)
        if self.group >= self.num_columns:
            group, scales = len(columns), slice(0, 1)
            repeats = 1
        else:
            group = math.gcd(self.group, begin)
            repeats, scales = self.group // group, slice(begin // group, -(-end // group))

        def of(values: torch.Tensor) -> torch.Tensor:
            return values[lines].repeat_interleave(repeats, 1)[:, scales].contiguous()

        return QuantisedTensor(
            self.q[lines, begin:end].contiguous(),
            of(self.scale),
            None if self.zero is None else of(self.zero),
            group,
            self.bits,
            max(0, min(self.k4 - begin, len(columns))) // _SCALE_K * _SCALE_K,
        )

    def interleaved(self, up: QuantisedTensor) -> QuantisedTensor:
        """This gate's rows and those of `up`, which has the same bits, group and k4, in turn."""
        zero = None if self.zero is None else interleave_gate_up(self.zero, up.zero)
        return replace(self, q=interleave_gate_up(self.q, up.q), scale=interleave_gate_up(self.scale, up.scale), zero=zero)

    @property
    def packed_format(self) -> PackedFormat:
        """The packed format that keeps the integers and scales."""
        wide = self.group % 128 == 0 or self.group == self.num_columns
        if self.zero is not None:
            return PackedFormat.U8G32 if self.bits == 8 else PackedFormat.U4G128 if wide else PackedFormat.U4G32
        if self.bits == 8:
            return PackedFormat.U8G128S if wide else PackedFormat.U8G32S
        return PackedFormat.U4G128S if wide else PackedFormat.U4G32S

    @property
    def values(self) -> torch.Tensor:
        """[num_rows, num_columns] float32."""
        zero = -(2 ** (self.bits - 1)) * self.scale if self.zero is None else self.zero
        scale, zero = (t.repeat_interleave(self.group, 1)[:, : self.num_columns] for t in (self.scale, zero))
        return self.q * scale + zero


class Checkpoint(Protocol):
    """Named tensors. The names are GGUF's: `token_embd.weight`, `blk.0.attn_q.weight`, ..."""

    path: Path

    @property
    def tensor_names(self) -> list[str]: ...

    def has_tensor(self, name: str) -> bool: ...

    def tensor(self, name: str) -> RawTensor | QuantisedTensor: ...

    def vector(self, name: str) -> torch.Tensor: ...
