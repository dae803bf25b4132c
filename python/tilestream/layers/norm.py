"""RMS normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilestream.ops.quantise import QuantisedRows

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator


class RmsNorm:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        weight: [hidden] float32; Gemma's stored offset of 1 is already added.
        eps: added to the mean square.
        communicator: of the ranks whose x, parts of a sum, are added first; None: x is whole.
        has_sum: what comes before adds to the residual stream itself.
    """

    def __init__(
        self, weight: torch.Tensor, eps: float, communicator: Communicator | None = None, *, has_sum: bool = False
    ) -> None:
        self.weight, self.eps, self.communicator, self.has_sum = weight, eps, communicator, has_sum
        self._norm, self._norm_quant = torch.ops.tilestream.rms_norm.default, torch.ops.tilestream.rms_norm_quant.default
        self._add_norm = torch.ops.tilestream.fused_add_rms_norm.default
        self._add_norm_quant = torch.ops.tilestream.fused_add_rms_norm_quant.default

    def __call__(self, x: torch.Tensor, *, channel: int = 0) -> None:
        """Normalises x, [num_tokens, hidden] or [num_tokens, num_heads, hidden], in place. channel: of the communicator."""
        if self.communicator is not None:
            return self.communicator.allreduce_rmsnorm(x, None, self.weight, eps=self.eps, channel=channel)
        self._norm(x, self.weight, x, eps=self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, int8: QuantisedRows | None = None, *, channel: int = 0
    ) -> torch.Tensor | QuantisedRows:
        """residual += x, unless it has the sum; norm(residual) is written into `int8` where that is given, else over x, and
        returned."""
        if self.communicator is not None:
            self.communicator.allreduce_rmsnorm(x, residual, self.weight, eps=self.eps, int8=int8, channel=channel)
        elif self.has_sum:
            self._norm_of(residual, x, int8)
        elif int8 is None:
            self._add_norm(x, residual, self.weight, eps=self.eps)
        else:
            self._add_norm_quant(x, residual, self.weight, int8.q, int8.scale, int8.sum, eps=self.eps)
        return x if int8 is None else int8

    def _norm_of(self, residual: torch.Tensor, x: torch.Tensor, int8: QuantisedRows | None) -> None:
        if int8 is None:
            self._norm(residual, self.weight, x, eps=self.eps)
        else:
            self._norm_quant(residual, self.weight, int8.q, int8.scale, int8.sum, eps=self.eps)
