"""Activation buffers of a step, kept between steps so that a decode allocates nothing."""

from __future__ import annotations

import torch

from tilestream.models.config import ModelConfig
from tilestream.ops.quantise import QuantisedRows


# Rows that go through an MLP together: what it writes in between, its widest buffers, then stays in L2.
_MLP_ROWS = 128


class Scratch:
    """Views for one number of tokens, into buffers shared by all layers and all steps.

    Attributes:
        x, residual: [num_tokens, hidden].
        qkv: [num_tokens, qo_size + 2 * kv_size]; q, k, v are its [num_tokens, heads, head_dim] views.
        heads, heads_flat: attention's output, [num_tokens, num_qo_heads, head_dim] and [num_tokens, qo_size].
        mlp_rows: how many rows go through the MLP together: num_tokens in equal parts.
        gate_up, act: [mlp_rows, 2 * intermediate] and [mlp_rows, intermediate].
        x_int8, act_int8: as x and act, for the linears that take int8 rows; None where the width is no multiple of 32.
    """

    def __init__(self, config: ModelConfig, base: torch.Tensor, num_tokens: int) -> None:
        self._base, self._offset = base, 0
        self.mlp_rows = -(-num_tokens // -(-num_tokens // _MLP_ROWS))
        self.x = self._take(num_tokens, config.hidden_size)
        self.residual = self._take(num_tokens, config.hidden_size)
        self.qkv = self._take(num_tokens, config.qo_size + 2 * config.kv_size)
        self.heads_flat = self._take(num_tokens, config.qo_size)
        self.gate_up = self._take(self.mlp_rows, 2 * config.intermediate_size)
        self.act = self._take(self.mlp_rows, config.intermediate_size)
        self.x_int8 = self._take_int8(num_tokens, config.hidden_size)
        self.act_int8 = self._take_int8(self.mlp_rows, config.intermediate_size)
        head_dim, qo, kv = config.head_dim, config.qo_size, config.kv_size
        self.q = self.qkv[:, :qo].unflatten(1, (-1, head_dim))
        self.k = self.qkv[:, qo : qo + kv].unflatten(1, (-1, head_dim))
        self.v = self.qkv[:, qo + kv :].unflatten(1, (-1, head_dim))
        self.heads = self.heads_flat.unflatten(1, (-1, head_dim))

    def _take(self, rows: int, width: int) -> torch.Tensor:
        """The next [rows, width] buffer, at a 64-byte boundary."""
        begin, num = self._offset, rows * width
        self._offset = begin + -(-num // 16) * 16
        return self._base[begin : begin + num].view(rows, width)

    def _take_int8(self, rows: int, width: int) -> QuantisedRows | None:
        if width % 32 != 0:
            return None
        q = self._take(rows, width // 4).view(torch.int8)
        return QuantisedRows(q, self._take(rows, -(-width // 128)), self._take(rows, width // 32).view(torch.int32))


class ScratchPool:
    """Hands out a Scratch per number of tokens; the memory below grows and never shrinks."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._floats_per_token = (
            2 * config.hidden_size + 2 * (config.qo_size + config.kv_size) + 3 * config.intermediate_size
            + sum(width // 4 + -(-width // 128) + width // 32 for width in (config.hidden_size, config.intermediate_size))
        )  # fmt: skip
        self._base = torch.empty(0)
        self._views: dict[int, Scratch] = {}

    def get(self, num_tokens: int) -> Scratch:
        views = self._views.get(num_tokens)
        if views is None:
            need = num_tokens * self._floats_per_token + 12 * 16  # twelve buffers, each rounded up to 16 floats
            if self._base.numel() < need:
                self._base = torch.empty(need)
                self._views.clear()
            views = self._views[num_tokens] = Scratch(self._config, self._base, num_tokens)
        return views
