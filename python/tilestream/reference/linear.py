"""Linear layers in float64: dequantised weights, and the exact model of dynamic int8 activations."""

import torch

SCALE_K = 128  # consecutive k that share an activation scale; the last of a row may be fewer


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


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row and span of 128: scale = max|x| / 127.

    Args:
        x: [m, k].
    Returns:
        q: [m, k], int64 in -127..127, rounded to nearest (ties to even).
        scale: [m, ceil(k / 128)], float64; 0 for a span of zeros.
    """
    m, k = x.shape
    padded = torch.nn.functional.pad(x.double(), (0, -k % SCALE_K)).unflatten(1, (-1, SCALE_K))
    scale = padded.abs().amax(-1) / 127.0
    q = torch.round(padded / torch.where(scale == 0, 1.0, scale).unsqueeze(-1))
    return q.flatten(1)[:, :k].long(), scale


def dequantise_rows(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q * scale of its span: [m, k] float64 from q [m, k] and scale [m, ceil(k / 128)]."""
    return q.double() * scale.double().repeat_interleave(SCALE_K, 1)[:, : q.shape[1]]


def linear_int8(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor,
                bias: torch.Tensor | None = None) -> torch.Tensor:
    """What `linear` on a group-quantised weight computes, without its float32 rounding.

    y[m, n] = sum over spans of x_scale * sum over its groups of (scale * (x_q . w_q) + zero * sum(x_q))

    Args:
        x: [m, k].
        q: [n, k] unsigned weights.
        scale, zero: [n, k / group], group a multiple of 32.
    Returns:
        [m, n], float64.
    """
    return linear(dequantise_rows(*quantise(x)), dequantise(q, scale, zero), bias)
