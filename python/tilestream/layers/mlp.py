"""The gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilestream.layers.linear import Linear, StackedLinear
from tilestream.ops.quantise import QuantisedRows

if TYPE_CHECKING:
    from tilestream.layers.scratch import Scratch


class GatedMlp:
    """down(act(gate(x)) * up(x)).

    Args:
        gate_up: [2 * intermediate, hidden]: with a gate of its own, rows that alternate between gate and up; without, gate's
            rows first.
        down: [hidden, intermediate].
        activation: "silu" or "gelu_tanh".
        hadamard: what down reads is multiplied by Hadamard matrices (`ops.hadamard`), as its weight was.
    """

    def __init__(self, gate_up: Linear | StackedLinear, down: Linear, activation: str, *, hadamard: bool = False) -> None:
        self.gate_up, self.down, self._hadamard = gate_up, down, hadamard
        self._act = getattr(torch.ops.tilestream, activation + "_and_mul").default
        self._act_quant = getattr(torch.ops.tilestream, activation + "_and_mul_quant").default
        self._quantise, self._turn = torch.ops.tilestream.quantise.default, torch.ops.tilestream.hadamard.default

    def __call__(self, x: torch.Tensor | QuantisedRows, buf: Scratch) -> None:
        """Writes the MLP's output for x, the normalised rows, into buf.branch, buf.mlp_rows rows at a time."""
        (out, residual), step = buf.branch, buf.mlp_rows  # residual: out, or None
        num_tokens = out.size(0)
        for begin in range(0, num_tokens, step):
            rows = slice(begin, min(begin + step, num_tokens))
            part = slice(0, rows.stop - begin)
            to = out[rows]
            self.down(self._inner(x[rows], buf, part), to, to if residual is not None else None)

    def _inner(self, x: torch.Tensor | QuantisedRows, buf: Scratch, part: slice) -> torch.Tensor | QuantisedRows:
        """act(gate(x)) * up(x), as `down` takes it, in those rows of a buffer."""
        act, is_gated = buf.act[part], self.gate_up.gate is not None
        both = act if is_gated else buf.gate_up[part]
        self.gate_up(x, both)
        takes_int8 = buf.act_int8 is not None and self.down.takes_int8
        if not is_gated and (self._hadamard or not takes_int8):
            self._act(both, act)
        if not takes_int8:
            if self._hadamard:
                self._turn(act, act)
            return act
        if is_gated and not self._hadamard and self.down.k4 == 0:
            return act  # all INT8: down quantises by itself
        int8 = buf.act_int8.with_k4(self.down.k4)[part]
        if is_gated or self._hadamard:
            self._quantise(act, int8.q, int8.scale, int8.sum, hadamard=self._hadamard)
        else:
            self._act_quant(both, int8.q, int8.scale, int8.sum)
        return int8
