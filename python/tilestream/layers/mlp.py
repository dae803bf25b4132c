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
        gate_up: [2 * intermediate, hidden], gate's rows first.
        down: [hidden, intermediate].
        activation: "silu" or "gelu_tanh".
    """

    def __init__(self, gate_up: Linear | StackedLinear, down: Linear, activation: str) -> None:
        self.gate_up, self.down = gate_up, down
        self._act = getattr(torch.ops.tilestream, activation + "_and_mul").default
        self._act_quant = getattr(torch.ops.tilestream, activation + "_and_mul_quant").default

    def __call__(self, x: torch.Tensor | QuantisedRows, buf: Scratch) -> None:
        """Writes the MLP's output for x, the normalised rows, into buf.x, buf.mlp_rows rows at a time."""
        num_tokens, step = buf.x.size(0), buf.mlp_rows
        for begin in range(0, num_tokens, step):
            rows = slice(begin, min(begin + step, num_tokens))
            part = slice(0, rows.stop - begin)
            self.gate_up(x[rows], buf.gate_up[part])
            if buf.act_int8 is not None and self.down.takes_int8:
                act = buf.act_int8.with_k4(self.down.k4)[part]
                self._act_quant(buf.gate_up[part], act.q, act.scale, act.sum)
                self.down(act, buf.x[rows])
            else:
                self._act(buf.gate_up[part], buf.act[part])
                self.down(buf.act[part], buf.x[rows])
