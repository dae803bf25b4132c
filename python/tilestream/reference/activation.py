"""Gated activations in float64."""

import math

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :n]) * x[..., n:].

    Args:
        x: [..., 2n].
    Returns:
        [..., n], float64.
    """
    gate, up = x.double().chunk(2, -1)
    return gate / (1.0 + torch.exp(-gate)) * up


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) * x[..., n:] with g = x[..., :n].

    Args:
        x: [..., 2n].
    Returns:
        [..., n], float64.
    """
    gate, up = x.double().chunk(2, -1)
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up
