"""Gated activations of the MLP."""

from __future__ import annotations

import torch


def silu_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """out = silu(x[:, :d]) * x[:, d:].

    Args:
        x: [num_tokens, 2 * d], float32, float16 or bfloat16: gate, then up.
        out: [num_tokens, d], as x; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = x.new_empty(x.size(0), x.size(1) // 2)
    torch.ops.tilestream.silu_and_mul(x, out)
    return out


def gelu_tanh_and_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """out = gelu(x[:, :d], tanh form) * x[:, d:].

    Args:
        x: [num_tokens, 2 * d], float32, float16 or bfloat16: gate, then up.
        out: [num_tokens, d], as x; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = x.new_empty(x.size(0), x.size(1) // 2)
    torch.ops.tilestream.gelu_tanh_and_mul(x, out)
    return out
