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


def quantise_keys(x: torch.Tensor, offset: torch.Tensor, order: torch.Tensor, feedback: torch.Tensor) -> QuantisedRows:
    """To 4 bits, with the scale and zero of `quantise_rows`, but one element after another, each told the errors ahead of it.

    Args:
        x: [num_tokens, num_kv_heads, head_dim], rotated keys.
        offset, order, feedback: as in ops.KeyRounding. `offset` is taken from x: what is quantised is x - offset.
    """
    x = x.double() - offset.double()
    rows = quantise_rows(x, 4)
    divisor = torch.where(rows.scale == 0, 1.0, rows.scale)
    for head in range(x.shape[1]):
        left, scale, zero = x[:, head].clone(), rows.scale[:, head], rows.zero[:, head]
        elements = order[head].long()
        for i, c in enumerate(elements.tolist()):
            rows.q[:, head, c] = torch.round((left[:, c] - zero) / divisor[:, head]).clamp(0, 15).long()
            error = left[:, c] - (rows.q[:, head, c] * scale + zero)
            left[:, elements[i + 1 :]] -= error.unsqueeze(1) * feedback[head, i, i + 1 :].double()
    return rows


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
