"""Rotary embedding, KV quantisation and the paged cache, in float64 and one token at a time."""

import dataclasses
import math

import torch


def rope(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the first rotary_dim elements of every head.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos_sin: [max_position, rotary_dim]: cosines, then sines, of rotary_dim / 2 angles.
        positions: [num_tokens].
        interleaved: True pairs elements (2i, 2i + 1), False pairs (i, i + rotary_dim / 2).
    Returns:
        as x, float64.
    """
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.double()[positions.long()].unsqueeze(1).chunk(2, -1)
    out = x.double().clone()
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    a, b = x.double()[..., first], x.double()[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


@dataclasses.dataclass(frozen=True)
class QuantisedRows:
    """Asymmetric quantisation of the last dim: value = q * scale + zero.

    q: int64, 0 .. 2^bits - 1.   scale, zero: float64 holding float16 values, shape without the last dim.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def dequantise(self) -> torch.Tensor:
        return self.q.double() * self.scale.unsqueeze(-1) + self.zero.unsqueeze(-1)


def quantise_rows(x: torch.Tensor, bits: int) -> QuantisedRows:
    """One scale and zero per row: zero = min, scale = (max - min) / (2^bits - 1), both rounded to float16.

    Args:
        x: [..., head_dim].
        bits: 4 or 8.
    """
    x = x.double()
    levels = 2**bits - 1
    zero = x.amin(-1).half().double()
    scale = ((x.amax(-1) - x.amin(-1)) / levels).half().double()
    divisor = torch.where(scale == 0, math.inf, scale)
    q = torch.round((x - zero.unsqueeze(-1)) / divisor.unsqueeze(-1)).clamp(0, levels).long()
    return QuantisedRows(q, scale, zero)


def key_statistics(pages: dict[int, list[torch.Tensor]], num_pages: int) -> torch.Tensor:
    """Per-page minimum and maximum of the rotated keys.

    Args:
        pages: page -> its keys since offset 0 was last written, each [num_kv_heads, head_dim].
    Returns:
        float64 [num_pages, num_kv_heads, 2, head_dim]; NaN for pages without a key.
    """
    num_kv_heads, head_dim = next(iter(pages.values()))[0].shape
    stats = torch.full((num_pages, num_kv_heads, 2, head_dim), math.nan, dtype=torch.float64)
    for page, keys in pages.items():
        stacked = torch.stack(keys).double()
        stats[page, :, 0], stats[page, :, 1] = stacked.amin(0), stacked.amax(0)
    return stats
