"""RMS normalisation in float64."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    Args:
        x: [..., hidden].
        weight: [hidden].
    Returns:
        as x, float64.
    """
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
                       eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its norm.

    Returns:
        normed, new_residual: float64; neither is rounded to the inputs' dtype.
    """
    total = residual.double() + x.double()
    return rms_norm(total, weight, eps), total
