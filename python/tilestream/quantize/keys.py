"""A basis of keys that 4 bits can hold: every RoPE pair scaled and turned by an angle of its own.

A pair of k may be multiplied by any complex number if the pair of q is divided by its conjugate: q . k stays, and so it does
after RoPE, which multiplies both by e^(i position frequency). The cache rounds a key in steps of its head's range
(max - min) / 15, so what counts is

    E[range(k)^2] * E[|q|^2],    over keys in the measure in which attention depends on them.

The scale (QServe's SmoothAttention, 2405.04532) makes outlying pairs small. The angle gives slow pairs, whose values hardly
change from key to key, one sign and one size in both elements: the zero point then takes what they have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_NUM_SAMPLES = 512  # keys of a head, drawn in proportion to their weight
_NUM_STEPS = 100
_RATE = 0.05
_TINY = 1e-20  # in the place of 0, which heads that were pruned have


@dataclass(frozen=True, slots=True)
class KeyBasis:
    """What k's pairs are divided by and turned by; q's are multiplied and turned.

    Attributes:
        scale: [num_kv_heads, rotary_dim / 2].
        angle: as scale, radians.
    """

    scale: torch.Tensor
    angle: torch.Tensor

    def first(self) -> KeyBasis:
        """The first head's alone."""
        return KeyBasis(self.scale[:1], self.angle[:1])

    def apply(self, rows: torch.Tensor, head_dim: int, *, queries: bool) -> torch.Tensor:
        """Rows of the projection to q or k (or its bias), [num_heads * head_dim, ...], in the new basis."""
        num_kv_heads, half = self.scale.shape
        heads = rows.reshape(num_kv_heads, -1, head_dim, rows[0].numel())
        factor = (self.scale if queries else 1 / self.scale)[:, None, :, None]
        cos, sin = (self.angle.cos()[:, None, :, None] * factor, self.angle.sin()[:, None, :, None] * factor)
        a, b, kept = heads.split([half, half, head_dim - 2 * half], 2)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, kept], 2).reshape(rows.shape)


def find_key_basis(q: torch.Tensor, k: torch.Tensor, attention: torch.Tensor, rotary_dim: int, *, shared: bool) -> KeyBasis:
    """The basis with the least error, by gradient descent.

    Args:
        q: [windows, num_qo_heads, tokens, head_dim], after RoPE.
        k: [windows, num_kv_heads, tokens, head_dim], after RoPE.
        attention: [windows, num_qo_heads, tokens, tokens], the probabilities.
        rotary_dim: leading elements of a head that RoPE rotates.
        shared: one scale for all heads and no angle, where a norm of heads takes the basis up.
    """
    num_kv_heads, half = k.size(1), rotary_dim // 2
    weight = (attention * (1 - attention)).sum(2).unflatten(1, (num_kv_heads, -1)).sum(2)
    weight, keys = weight.transpose(0, 1).flatten(1), k.transpose(0, 1).flatten(1, 2)
    drawn = torch.multinomial(weight + 1e-12, _NUM_SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    keys = keys.gather(1, drawn[..., None].expand(-1, -1, keys.size(2)))
    energy = q.square().unflatten(1, (num_kv_heads, -1)).mean((0, 2, 3))
    q_pairs, q_kept = energy[:, :half] + energy[:, half:rotary_dim], energy[:, rotary_dim:].sum(1)
    a, b, kept = keys.split([half, half, keys.size(2) - rotary_dim], 2)
    angle = torch.zeros(num_kv_heads, half) if shared else math.pi / 4 - torch.atan2(b.mean(1), a.mean(1))
    log_scale = torch.zeros(1 if shared else num_kv_heads, half)
    with torch.enable_grad():
        moving = [log_scale.requires_grad_()] if shared else [log_scale.requires_grad_(), angle.requires_grad_()]
        optimiser = torch.optim.Adam(moving)
        for step in range(_NUM_STEPS):
            optimiser.param_groups[0]["lr"] = _RATE * (1 - step / _NUM_STEPS)
            scale = log_scale.exp().expand(num_kv_heads, -1)
            cos, sin = (angle.cos() / scale)[:, None], (angle.sin() / scale)[:, None]
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos, kept], 2)
            steps = (turned.amax(2) - turned.amin(2)).square().mean(1)
            norms = (scale.square() * q_pairs).sum(1) + q_kept
            loss = (steps.clamp_min(_TINY).log() + norms.clamp_min(_TINY).log()).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return KeyBasis(log_scale.detach().exp().expand(num_kv_heads, -1), angle.detach())
