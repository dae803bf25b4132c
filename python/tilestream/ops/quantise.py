"""Activations as int8 rows (csrc/include/tilestream/quantise.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GROUP_K, _SCALE_K = 32, 128


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Symmetric int8 rows: value = q * scale, one scale per row and 128 consecutive elements (W4A8's activations).

    Args:
        q: [num_rows, k], int8 in -127..127, k a multiple of 32.
        scale: [num_rows, ceil(k / 128)], float32.
        sum: [num_rows, k / 32], int32: of q over each group of 32, what a weight's zero point meets of a row.
    """

    q: torch.Tensor
    scale: torch.Tensor
    sum: torch.Tensor

    @staticmethod
    def empty(num_rows: int, k: int, *, device: torch.device | str = "cpu") -> QuantisedRows:
        """Room for num_rows rows of k elements."""
        return QuantisedRows(
            torch.empty(num_rows, k, dtype=torch.int8, device=device),
            torch.empty(num_rows, -(-k // _SCALE_K), device=device),
            torch.empty(num_rows, k // _GROUP_K, dtype=torch.int32, device=device),
        )

    def __getitem__(self, rows: slice) -> QuantisedRows:
        """A range of rows, sharing memory."""
        return QuantisedRows(self.q[rows], self.scale[rows], self.sum[rows])


def quantise(x: torch.Tensor, *, out: QuantisedRows | None = None) -> QuantisedRows:
    """Round every row to int8, to nearest even, with scale = max|x| / 127 of each 128 elements.

    Args:
        x: [num_rows, k], float32, float16 or bfloat16, last dim contiguous; k a multiple of 32.
        out: room for [num_rows, k]; allocated when None.
    Returns:
        out. 128 elements of which one is NaN or infinite have scale NaN.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1), device=x.device)
    torch.ops.tilestream.quantise(x, out.q, out.scale, out.sum)
    return out
