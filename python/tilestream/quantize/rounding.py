"""What the kernels round, done to floats: activations by blocks, keys and values by heads (docs/quantize.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilestream.ops import KeyRounding

BLOCK_K = 128  # consecutive channels with one activation scale, wholly INT4 or wholly INT8


def round_rows(rows: torch.Tensor, k4: int) -> torch.Tensor:
    """Rows as a linear gets them, with one scale for each 128 channels; the first k4 channels have 4 bits."""
    k = rows.size(-1)
    blocks = F.pad(rows, (0, -k % BLOCK_K)).unflatten(-1, (-1, BLOCK_K))
    amax, is_int4 = blocks.abs().amax(-1, keepdim=True), torch.arange(blocks.size(-2))[:, None] < k4 // BLOCK_K
    levels_4 = torch.where(blocks.amax(-1, keepdim=True) == amax, -8.0, 8.0)  # the largest magnitude is -8
    scale = amax / torch.where(is_int4, levels_4, 127.0)
    steps = (blocks / scale.masked_fill(scale == 0, 1.0)).round_().clamp_(max=torch.where(is_int4, 7.0, 127.0))
    return steps.mul_(scale).flatten(-2)[..., :k]


def round_kv(heads: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys or values as the cache returns them: asymmetric, one scale and one zero per token and head."""
    scale, zero = _grid(heads, bits)
    return _to_grid(heads, scale, zero, bits)


def round_keys(keys: torch.Tensor, rounding: KeyRounding) -> torch.Tensor:
    """Keys [windows, num_kv_heads, tokens, head_dim] as a 4-bit cache returns them, rounded with feedback.

    The offset is added again, for comparison with keys that none was taken from; attention gives the same either way.
    """
    offset, order = rounding.offset[:, None], rounding.order[:, None].long().expand_as(keys)
    scale, zero = _grid(keys - offset, 4)
    left = (keys - offset).gather(-1, order)
    for i in range(keys.size(-1)):
        element = left[..., i : i + 1]
        rounded = _to_grid(element, scale, zero, 4)
        left[..., i + 1 :] -= (element - rounded) * rounding.feedback[:, None, i, i + 1 :]
        element.copy_(rounded)
    return torch.empty_like(left).scatter_(-1, order, left) + offset


def _grid(heads: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = heads.amin(-1, keepdim=True), heads.amax(-1, keepdim=True)
    return ((high - low) / (2**bits - 1)).half().float(), low.half().float()


def _to_grid(heads: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    steps = (heads - zero) / scale.masked_fill(scale == 0, torch.inf)
    return steps.round_().clamp_(0, 2**bits - 1).mul_(scale).add_(zero)
