"""Linear layers in float64: dequantised weights, and the exact model of dynamic int8 activations."""

import torch

GROUP = 32  # consecutive k that share an activation scale


def dequantise(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """q * scale + zero by group.

    Args:
        q: [n, k] integers.
        scale, zero: [n, k / group].
    Returns:
        [n, k], float64.
    """
    group = q.shape[1] // scale.shape[1]
    return q.double() * scale.double().repeat_interleave(group, 1) + zero.double().repeat_interleave(group, 1)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x . weight^T + bias.

    Args:
        x: [m, k].
        weight: [n, k].
        bias: [n] or None.
    Returns:
        [m, n], float64.
    """
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def quantise_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row and group of 32: scale = max|x| / 127.

    Args:
        x: [m, k], k a multiple of 32.
    Returns:
        q: [m, k], int64 in -127..127, rounded to nearest (ties to even).
        scale: [m, k / 32], float64; 0 for a group of zeros.
    """
    groups = x.double().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / 127.0
    q = torch.round(groups / torch.where(scale == 0, 1.0, scale).unsqueeze(-1))
    return q.flatten(1).long(), scale


def linear_int8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor,
                bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `linear` on a group-quantised weight computes, without its float32 rounding.

    y[m, n] = sum over groups of x_scale * (scale * (x_q . w_q) + zero * sum(x_q))

    Args:
        x: [m, k].
        q: [n, k] unsigned weights.
        scale, zero: [n, k / group], group a multiple of 32.
    Returns:
        [m, n], float64.
    """
    x_q, x_scale = quantise_activations(x)
    rounded = x_q.double() * x_scale.repeat_interleave(GROUP, 1)
    return linear(rounded, dequantise(q, scale, zero), bias)
