"""Rotary embedding tables: frequencies, context-extension rules, and the cos/sin table the ops read.

Sources: RoPE 2104.09864; YaRN 2309.00071; Llama 3 herd 2407.21783 (frequency-dependent scaling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
        theta: base of the geometric series of wavelengths.
        rotary_dim: leading elements of a head that are rotated; even.
        interleaved: pairs are (2i, 2i + 1), GPT-J style, instead of the two halves, NeoX style.
        rope_type: one of ROPE_TYPES.
        factor: how many times the trained context is stretched.
        original_max_position: trained context, in tokens (llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's two corners, in wavelengths per trained context.
        beta_fast, beta_slow: yarn's two corners, in rotations per trained context.
        attention_factor: yarn's scale of cos and sin; None: 0.1 ln(factor) + 1.
        truncate: yarn's corners are rounded outwards to whole dimensions.
        freq_factors: divisors of each frequency (GGUF's `rope_freqs.weight`), or ().
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()

    def inv_freq(self) -> torch.Tensor:
        """Angle per position of each rotated pair: [rotary_dim / 2], float64, radians."""
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        freq = self.theta**-exponent
        if self.freq_factors:
            freq = freq / torch.tensor(self.freq_factors, dtype=torch.float64)
        if self.rope_type == "linear":
            return freq / self.factor
        if self.rope_type == "llama3":
            return self._llama3(freq)
        if self.rope_type == "yarn":
            return self._yarn(freq)
        return freq

    def _llama3(self, freq: torch.Tensor) -> torch.Tensor:
        """Long wavelengths are stretched, short ones kept, those between blended."""
        rotations = self.original_max_position * freq / (2 * math.pi)
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return kept * freq + (1.0 - kept) * freq / self.factor

    def _yarn(self, freq: torch.Tensor) -> torch.Tensor:
        """As `_llama3`, with the ramp linear in the dimension instead of in the frequency."""
        low, high = (
            self.rotary_dim * math.log(self.original_max_position / (beta * 2 * math.pi)) / (2 * math.log(self.theta))
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = (torch.arange(self.rotary_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
        kept = 1.0 - ramp.clamp(0.0, 1.0)
        return kept * freq + (1.0 - kept) * freq / self.factor

    def magnitude(self) -> float:
        """Scale of cos and sin; 1 except for yarn, which sharpens attention over the longer context."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    def cos_sin_table(self, max_position: int) -> torch.Tensor:
        """Table of `append_kv`: [max_position, rotary_dim] float32, cos in the first half, sin in the second.

        Angles are computed in float64: in float32 an angle of 1e5 radians has lost its third decimal.
        """
        table = torch.empty(max_position, self.rotary_dim, dtype=torch.float32)
        half, freq, magnitude = self.rotary_dim // 2, self.inv_freq(), self.magnitude()
        rows = 8192  # bounds the float64 temporaries of a long context to a few megabytes
        for begin in range(0, max_position, rows):
            end = min(begin + rows, max_position)
            angle = torch.arange(begin, end, dtype=torch.float64).unsqueeze(1) * freq
            table[begin:end, :half] = angle.cos() * magnitude
            table[begin:end, half:] = angle.sin() * magnitude
        return table


class RopeTable:
    """The table of one RopeConfig, with as many rows as have been needed so far (long contexts cost much memory).

    Attributes:
        table: [rows, rotary_dim] float32, see RopeConfig.cos_sin_table.
    """

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        self.grow(0)

    def grow(self, rows: int) -> None:
        """Replace the table by one of `rows` rows."""
        self.table = self.config.cos_sin_table(rows).to(self._device)
