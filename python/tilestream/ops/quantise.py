"""Activations as rows of integers (csrc/include/tilestream/quantise.h)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GROUP_K, _SCALE_K = 32, 128


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Integers: value = q * scale, one scale per row and 128 consecutive elements (COMET, 2410.12168, section 4).

    The first k4 elements of a row are INT4, in -8..7, the others INT8, in -127..127: W4A8's activations with k4 = 0, W4Ax's
    otherwise. Of INT4 the value of largest magnitude is -8, so its scale is negative where that value is positive.

    Args:
        q: [num_rows, k - k4 / 2], int8, k a multiple of 32: k4 / 2 bytes of nibbles (in 32 elements, byte j has element j
            in its low half, j + 16 in its high one), then one byte an element.
        scale: [num_rows, ceil(k / 128)], float32.
        sum: [num_rows, k / 32], int32: of the integers over each group of 32, what a weight's zero point meets of a row.
    """

    q: torch.Tensor
    scale: torch.Tensor
    sum: torch.Tensor

    @staticmethod
    def empty(num_rows: int, k: int, *, k4: int = 0, device: torch.device | str = "cpu") -> QuantisedRows:
        """Room for num_rows rows of k elements, the first k4 of them INT4."""
        return QuantisedRows(
            torch.empty(num_rows, k - k4 // 2, dtype=torch.int8, device=device),
            torch.empty(num_rows, -(-k // _SCALE_K), device=device),
            torch.empty(num_rows, k // _GROUP_K, dtype=torch.int32, device=device),
        )

    @property
    def k(self) -> int:
        """Elements of a row."""
        return self.sum.size(1) * _GROUP_K

    @property
    def k4(self) -> int:
        """Elements of a row that are INT4."""
        return 2 * (self.k - self.q.size(1))

    def with_k4(self, k4: int) -> QuantisedRows:
        """The same room for rows whose first k4 elements are INT4.

        Args:
            k4: a multiple of 128. The room itself is contiguous and made with k4 = 0.
        Returns:
            Views of its memory.
        Raises:
            RuntimeError: torch's own, where q is not contiguous.
        """
        if k4 == 0:
            return self
        num_rows, row_bytes = self.q.size(0), self.k - k4 // 2
        return QuantisedRows(self.q.view(-1)[: num_rows * row_bytes].view(num_rows, row_bytes), self.scale, self.sum)

    def __getitem__(self, rows: slice) -> QuantisedRows:
        """A range of rows, sharing memory."""
        return QuantisedRows(self.q[rows], self.scale[rows], self.sum[rows])


def quantise(
    x: torch.Tensor, *, k4: int = 0, hadamard: bool = False, out: QuantisedRows | None = None
) -> QuantisedRows:
    """Round every row to integers, to nearest even, with scale = max|x| / 127 of each 128 elements.

    INT4: scale = max|x| / -8 where the element of largest magnitude is positive, max|x| / 8 where it is negative; what rounds
    to 8 becomes 7.

    Args:
        x: [num_rows, k], float32, float16 or bfloat16, last dim contiguous; k a multiple of 32.
        k4: how many leading elements become INT4, a multiple of 128; `out` has a k4 of its own.
        hadamard: the rows are first turned as by `hadamard`, in float32.
        out: room for [num_rows, k]; allocated when None.
    Returns:
        out. 128 elements of which one is NaN or infinite have scale NaN.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1), k4=k4, device=x.device)
    torch.ops.tilestream.quantise(x, out.q, out.scale, out.sum, hadamard=hadamard)
    return out


def hadamard(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply every 128 elements by the orthogonal Hadamard matrix H of 128 (Sylvester's, symmetric): what a few of them have
    more than the others is then in all of them alike, and 4 bits hold it better (QuaRot, 2404.00456, section 4).

    A linear whose weight was multiplied by H too, 128 columns at a time, gives of these rows what it gave before.

    Args:
        x: [num_rows, k], float32, float16 or bfloat16, last dim contiguous; k a multiple of 128.
        out: as x, which it may be; allocated when None.
    Returns:
        out. Computed in float32. 128 elements of which one is NaN or infinite are NaN.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = torch.empty_like(x)
    torch.ops.tilestream.hadamard(x, out)
    return out
