"""Gated activations of the MLP."""

from __future__ import annotations

import torch

from tilestream.ops.quantise import QuantisedRows


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


def silu_and_mul_quant(x: torch.Tensor, *, k4: int = 0, out: QuantisedRows | None = None) -> QuantisedRows:
    """out = quantise(silu(x[:, :d]) * x[:, d:]): the input of a W4A8, W4Ax or W8A8 linear.

    Args:
        x: [num_tokens, 2 * d], float32, float16 or bfloat16: gate, then up; d a multiple of 32.
        k4: how many leading elements of a row become INT4, a multiple of 128; `out` has a k4 of its own.
        out: room for [num_tokens, d]; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1) // 2, k4=k4, device=x.device)
    torch.ops.tilestream.silu_and_mul_quant(x, out.q, out.scale, out.sum)
    return out


def gelu_tanh_and_mul_quant(x: torch.Tensor, *, k4: int = 0, out: QuantisedRows | None = None) -> QuantisedRows:
    """out = quantise(gelu(x[:, :d], tanh form) * x[:, d:]): the input of a W4A8, W4Ax or W8A8 linear.

    Args:
        x: [num_tokens, 2 * d], float32, float16 or bfloat16: gate, then up; d a multiple of 32.
        k4: how many leading elements of a row become INT4, a multiple of 128; `out` has a k4 of its own.
        out: room for [num_tokens, d]; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1) // 2, k4=k4, device=x.device)
    torch.ops.tilestream.gelu_tanh_and_mul_quant(x, out.q, out.scale, out.sum)
    return out
