"""RMS normalisation."""

from __future__ import annotations

import torch

from tilestream.ops.quantise import QuantisedRows


class RmsNorm:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        weight: [hidden] float32; Gemma's stored offset of 1 is already added.
        eps: added to the mean square.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._norm = torch.ops.tilestream.rms_norm.default
        self._add_norm = torch.ops.tilestream.fused_add_rms_norm.default
        self._add_norm_quant = torch.ops.tilestream.fused_add_rms_norm_quant.default

    def __call__(self, x: torch.Tensor) -> None:
        """Normalises x, [num_tokens, hidden] or [num_tokens, num_heads, hidden], in place."""
        self._norm(x, self.weight, x, eps=self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, int8: QuantisedRows | None = None
    ) -> torch.Tensor | QuantisedRows:
        """residual += x; norm(residual) is written into `int8` where that is given, else over x, and returned."""
        if int8 is None:
            self._add_norm(x, residual, self.weight, eps=self.eps)
            return x
        self._add_norm_quant(x, residual, self.weight, int8.q, int8.scale, int8.sum, eps=self.eps)
        return int8
