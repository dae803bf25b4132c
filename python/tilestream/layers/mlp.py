"""The gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilestream.layers.linear import Linear, StackedLinear

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

    def __call__(self, buf: Scratch) -> None:
        """Replaces buf.x by the MLP's output."""
        self.gate_up(buf.x, buf.gate_up)
        self._act(buf.gate_up, buf.act)
        self.down(buf.act, buf.x)
