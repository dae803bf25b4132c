"""Activation buffers of a step, kept between steps so that a decode allocates nothing."""

from __future__ import annotations

import torch

from tilestream.models.config import ModelConfig
from tilestream.ops.quantise import QuantisedRows
from tilestream.placement import Placement

# Rows that go through an MLP together on a CPU: what it writes in between, its widest buffers, then stays in L2.
_CPU_MLP_ROWS = 128
_ALIGNMENT_BYTES = 64


class Scratch:
    """Views for one number of tokens, into buffers shared by all layers and all steps. Floats are of the placement's dtype.

    Attributes:
        x, residual: [num_tokens, hidden].
        qkv: [num_tokens, qo_size + 2 * kv_size]; q, k, v are its [num_tokens, heads, head_dim] views.
        heads, heads_flat: attention's output, [num_tokens, num_qo_heads, head_dim] and [num_tokens, qo_size].
        mlp_rows: how many rows go through the MLP together: num_tokens in equal parts.
        gate_up, act: [mlp_rows, 2 * intermediate] and [mlp_rows, intermediate].
        x_int8, heads_int8, act_int8: as x, heads_flat and act, for the linears that take integers; None where the width is no
            multiple of 32.
        num_bytes: of all of them.
    """

    def __init__(self, config: ModelConfig, placement: Placement, base: torch.Tensor, num_tokens: int) -> None:
        self._base, self._dtype, self.num_bytes = base, placement.dtype, 0
        most_rows = _CPU_MLP_ROWS if placement.device.type == "cpu" else num_tokens
        self.mlp_rows = -(-num_tokens // -(-num_tokens // most_rows))
        self.x = self._take(num_tokens, config.hidden_size)
        self.residual = self._take(num_tokens, config.hidden_size)
        self.qkv = self._take(num_tokens, config.qo_size + 2 * config.kv_size)
        self.heads_flat = self._take(num_tokens, config.qo_size)
        self.gate_up = self._take(self.mlp_rows, 2 * config.intermediate_size)
        self.act = self._take(self.mlp_rows, config.intermediate_size)
        self.x_int8 = self._take_int8(num_tokens, config.hidden_size)
        self.heads_int8 = self._take_int8(num_tokens, config.qo_size)
        self.act_int8 = self._take_int8(self.mlp_rows, config.intermediate_size)
        head_dim, qo, kv = config.head_dim, config.qo_size, config.kv_size
        self.q = self.qkv[:, :qo].unflatten(1, (-1, head_dim))
        self.k = self.qkv[:, qo : qo + kv].unflatten(1, (-1, head_dim))
        self.v = self.qkv[:, qo + kv :].unflatten(1, (-1, head_dim))
        self.heads = self.heads_flat.unflatten(1, (-1, head_dim))

    def _take(self, rows: int, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The next [rows, width] buffer, at a 64-byte boundary."""
        dtype = dtype or self._dtype
        begin, num_bytes = self.num_bytes, rows * width * dtype.itemsize
        self.num_bytes = begin + -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._base[begin : begin + num_bytes].view(dtype).view(rows, width)

    def _take_int8(self, rows: int, width: int) -> QuantisedRows | None:
        if width % 32 != 0:
            return None
        return QuantisedRows(
            self._take(rows, width, torch.int8),
            self._take(rows, -(-width // 128), torch.float32),
            self._take(rows, width // 32, torch.int32),
        )


class ScratchPool:
    """Hands out a Scratch per number of tokens; the memory below grows and never shrinks."""

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement
        self._base = torch.empty(0, dtype=torch.uint8, device=placement.device)
        self._views: dict[int, Scratch] = {}

    def get(self, num_tokens: int) -> Scratch:
        views = self._views.get(num_tokens)
        if views is None:
            need = self._num_bytes(num_tokens)
            if self._base.numel() < need:
                self._base = torch.empty(need, dtype=torch.uint8, device=self._placement.device)
                self._views.clear()
            views = self._views[num_tokens] = Scratch(self._config, self._placement, self._base, num_tokens)
        return views

    def _num_bytes(self, num_tokens: int) -> int:
        """What a Scratch takes, found by laying one out in no memory."""
        nowhere = torch.empty(1 << 62, dtype=torch.uint8, device="meta")
        return Scratch(self._config, self._placement, nowhere, num_tokens).num_bytes
