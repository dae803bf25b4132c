"""What the kernels round, done to floats: activations by blocks, keys and values by heads (docs/quantize.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_K = 128  # consecutive channels with one activation scale, wholly INT4 or wholly INT8
_LEVELS_4, _LEVELS_8 = 7, 127


def round_rows(rows: torch.Tensor, k4: int) -> torch.Tensor:
    """Rows as a linear gets them: symmetric, one scale for each 128 channels; the first k4 channels have 4 bits."""
    k = rows.size(-1)
    blocks = F.pad(rows, (0, -k % BLOCK_K)).unflatten(-1, (-1, BLOCK_K))
    levels = torch.full((blocks.size(-2), 1), float(_LEVELS_8))
    levels[: k4 // BLOCK_K] = _LEVELS_4
    scale = blocks.abs().amax(-1, keepdim=True) / levels
    steps = blocks / scale.masked_fill(scale == 0, 1.0)
    return steps.round_().mul_(scale).flatten(-2)[..., :k]


def round_kv(heads: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys or values as the cache returns them: asymmetric, one scale and one zero per token and head."""
    levels = 2**bits - 1
    low, high = heads.amin(-1, keepdim=True), heads.amax(-1, keepdim=True)
    zero, scale = low.half().float(), ((high - low) / levels).half().float()
    return ((heads - zero) / scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(0, levels).mul_(scale).add_(zero)
