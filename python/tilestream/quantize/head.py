"""From the residual stream to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm and the output projection.

    Attributes:
        norm: [hidden] float32.
        weight: [vocabulary, hidden] float32.
        eps: of the norm.
        soft_cap: of the logits, 0: off.
    """

    norm: torch.Tensor
    weight: torch.Tensor
    eps: float
    soft_cap: float

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[..., vocabulary] of a stream [..., hidden]."""
        logits = F.rms_norm(x, self.norm.shape, self.norm, self.eps) @ self.weight.t()
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits
