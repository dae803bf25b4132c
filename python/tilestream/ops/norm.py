"""RMS normalisation."""

from __future__ import annotations

import torch

from tilestream.ops.quantise import QuantisedRows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, out: torch.Tensor | None = None) -> torch.Tensor:
    """out = x * rsqrt(mean(x ** 2) + eps) * weight, over the last dimension.

    Args:
        x: [num_tokens, hidden] or [num_tokens, num_heads, hidden], float32, float16 or bfloat16; last dim contiguous.
        weight: [hidden], float32.
        eps: added to the mean square.
        out: as x; may be x itself; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = torch.empty_like(x)
    torch.ops.tilestream.rms_norm(x, weight, out, eps=eps)
    return out


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, k4: int = 0, out: QuantisedRows | None = None
) -> QuantisedRows:
    """out = quantise(rms_norm(x)), in one pass: the input of a W4A8, W4Ax or W8A8 linear.

    Args:
        x: [num_tokens, hidden], float32, float16 or bfloat16, hidden a multiple of 32; not changed.
        weight: [hidden], float32.
        eps: added to the mean square.
        k4: how many leading elements of a row become INT4, a multiple of 128; `out` has a k4 of its own.
        out: room for [num_tokens, hidden]; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1), k4=k4, device=x.device)
    torch.ops.tilestream.rms_norm_quant(x, weight, out.q, out.scale, out.sum, eps=eps)
    return out


def fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> None:
    """residual += x; x = rms_norm(residual): both in place, one pass.

    Args:
        x: [num_tokens, hidden], float32, float16 or bfloat16; overwritten by the normalised sum.
        residual: as x; overwritten by the sum.
        weight: [hidden], float32.
        eps: added to the mean square.
    Returns:
        None.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    torch.ops.tilestream.fused_add_rms_norm(x, residual, weight, eps=eps)


def fused_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    k4: int = 0,
    out: QuantisedRows | None = None,
) -> QuantisedRows:
    """residual += x; out = quantise(rms_norm(residual)), in one pass: the input of a W4A8, W4Ax or W8A8 linear.

    Args:
        x: [num_tokens, hidden], float32, float16 or bfloat16, hidden a multiple of 32; not changed.
        residual: as x; overwritten by the sum.
        weight: [hidden], float32.
        eps: added to the mean square.
        k4: how many leading elements of a row become INT4, a multiple of 128; `out` has a k4 of its own.
        out: room for [num_tokens, hidden]; allocated when None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    if out is None:
        out = QuantisedRows.empty(x.size(0), x.size(1), k4=k4, device=x.device)
    torch.ops.tilestream.fused_add_rms_norm_quant(x, residual, weight, out.q, out.scale, out.sum, eps=eps)
    return out
