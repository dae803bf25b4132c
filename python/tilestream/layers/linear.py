"""Linear layers on packed weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilestream.ops.linear import PackedWeight, linear
from tilestream.ops.linear_choice import LinearKernel
from tilestream.ops.quantise import QuantisedRows


class Linear:
    """y = x . W^T (+ bias), or with a gate act of every second column times the next: `ops.linear`.

    Args:
        weight: packed [n, k].
        bias: [n] float32, or None.
        kernel: for a row-major weight, the one to use; None: by the number of rows.
        k4: how many leading elements of its rows are to come as INT4, where `takes_int8`.
        act_bits: for a group-quantised weight, 8, or 16: rows stay floats.
        gate: "silu" or "gelu_tanh" for a weight and a bias whose rows alternate between gate and up.
    Attributes:
        n: columns of y.
    """

    def __init__(
        self, weight: PackedWeight, bias: torch.Tensor | None = None, kernel: LinearKernel | None = None, *, k4: int = 0,
        act_bits: int = 8, gate: str | None = None,
    ) -> None:
        self.weight, self.bias, self._kernel, self.k4, self._act_bits, self.gate = weight, bias, kernel, k4, act_bits, gate
        self.n, self.k = weight.n if gate is None else weight.n // 2, weight.k
        self.takes_int8 = weight.format.is_quantised and act_bits == 8
        self._data, self._format = weight.data, int(weight.format)
        self._op, self._quant_op = torch.ops.tilestream.linear.default, torch.ops.tilestream.linear_quant.default

    def __call__(self, x: torch.Tensor | QuantisedRows, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """Writes [num_tokens, n] into `out` from x [num_tokens, k], integers where `takes_int8`; rows may be strided.

        residual: as `out`, which it may be; added.
        """
        n, format, gate = self.weight.n, self._format, self.gate
        if isinstance(x, QuantisedRows):
            self._quant_op(x.q, x.scale, x.sum, self._data, self.bias, out, n=n, format=format, gate=gate, residual=residual)
        elif self.weight.format.is_row_major:
            linear(x, self.weight, self.bias, out=out, kernel=self._kernel, gate=gate, residual=residual)
        else:
            act_bits = self._act_bits
            self._op(x, self._data, self.bias, out, n=n, format=format, act_bits=act_bits, gate=gate, residual=residual)


class StackedLinear:
    """Linear layers of one input whose outputs stand side by side, for weights that cannot share one packing."""

    gate = None

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = list(parts)
        self.n = sum(part.n for part in parts)
        self.takes_int8 = all(part.takes_int8 for part in parts)
        self.k4 = self.parts[0].k4  # one for all, who read the same rows

    def __call__(self, x: torch.Tensor | QuantisedRows, out: torch.Tensor) -> None:
        """As Linear: column ranges of `out` in the order of the parts."""
        begin = 0
        for part in self.parts:
            part(x, out[:, begin : begin + part.n])
            begin += part.n
