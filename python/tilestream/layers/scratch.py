"""Activation buffers of a step, kept between steps so that a decode allocates nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from tilestream.ops.quantise import QuantisedRows
from tilestream.placement import Placement

if TYPE_CHECKING:
    from tilestream.distributed.communicator import Communicator
    from tilestream.models.config import ModelConfig

# Rows that go through an MLP together on a CPU: what it writes in between, its widest buffers, then stays in L2.
CPU_MLP_ROWS = 128
_ALIGNMENT_BYTES = 64


class _Memory:
    """Cuts buffers from `base`, one after another.

    num_bytes: that they take.
    """

    def __init__(self, base: torch.Tensor) -> None:
        self._base, self.num_bytes = base, 0

    def take(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The next [rows, width] buffer, at a 64-byte boundary."""
        begin, num_bytes = self.num_bytes, rows * width * dtype.itemsize
        self.num_bytes = begin + -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._base[begin : begin + num_bytes].view(dtype).view(rows, width)

    def take_int8(self, rows: int, width: int) -> QuantisedRows | None:
        if width % 32 != 0:
            return None
        return QuantisedRows(
            self.take(rows, width, torch.int8),
            self.take(rows, -(-width // 128), torch.float32),
            self.take(rows, width // 32, torch.int32),
        )


class Scratch:
    """Views for one number of tokens, into buffers shared by all layers and all steps. Floats are of the placement's dtype.

    Args:
        shared: memory for x and x_int8, which all ranks see; its layout is the same on all of them.
        base: memory for the others.
        branches_add: attention and MLP add to the residual stream themselves.
        has_gate_up: some layer's gate and up are not joined in the linear that makes them.
    Attributes:
        x, residual: [num_tokens, hidden].
        qkv: [num_tokens, qo_size + 2 * kv_size]; q, k, v are its [num_tokens, heads, head_dim] views.
        heads, heads_flat: attention's output, [num_tokens, num_qo_heads, head_dim] and [num_tokens, qo_size].
        mlp_rows: how many rows go through the MLP together: num_tokens in equal parts.
        gate_up, act: [mlp_rows, 2 * intermediate], or None where no layer uses it, and [mlp_rows, intermediate].
        x_int8, heads_int8, act_int8: as x, heads_flat and act, for the linears that take integers; None where the width is no
            multiple of 32.
        branch: what attention and MLP write to, and what they add: (x, None) or twice residual, one tensor, so that additions
            are in place with every library.
        channel: of the communicator, for its norms.
        num_shared_bytes, num_bytes: of all of them, in either memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        shared: torch.Tensor,
        base: torch.Tensor,
        num_tokens: int,
        *,
        branches_add: bool = False,
        has_gate_up: bool = True,
    ) -> None:
        seen, own, dtype = _Memory(shared), _Memory(base), placement.dtype
        most_rows = CPU_MLP_ROWS if placement.device.type == "cpu" else num_tokens
        self.mlp_rows = -(-num_tokens // -(-num_tokens // most_rows))
        self.x = seen.take(num_tokens, config.hidden_size, dtype)
        self.x_int8 = seen.take_int8(num_tokens, config.hidden_size)
        self.residual = own.take(num_tokens, config.hidden_size, dtype)
        self.qkv = own.take(num_tokens, config.qo_size + 2 * config.kv_size, dtype)
        self.heads_flat = own.take(num_tokens, config.qo_size, dtype)
        self.gate_up = own.take(self.mlp_rows, 2 * config.intermediate_size, dtype) if has_gate_up else None
        self.act = own.take(self.mlp_rows, config.intermediate_size, dtype)
        self.heads_int8 = own.take_int8(num_tokens, config.qo_size)
        self.act_int8 = own.take_int8(self.mlp_rows, config.intermediate_size)
        self.branch = (self.residual, self.residual) if branches_add else (self.x, None)
        self.channel = 0
        self.num_shared_bytes, self.num_bytes = seen.num_bytes, own.num_bytes
        head_dim, qo, kv = config.head_dim, config.qo_size, config.kv_size
        self.q = self.qkv[:, :qo].unflatten(1, (-1, head_dim))
        self.k = self.qkv[:, qo : qo + kv].unflatten(1, (-1, head_dim))
        self.v = self.qkv[:, qo + kv :].unflatten(1, (-1, head_dim))
        self.heads = self.heads_flat.unflatten(1, (-1, head_dim))

    def part(self, begin: int, end: int, *, channel: int) -> Scratch:
        """That of tokens [begin, end), in the same memory. The MLP's buffers are those of all parts, which use them in turn."""
        part = copy.copy(self)
        for name in ("x", "residual", "qkv", "q", "k", "v", "heads", "heads_flat", "x_int8", "heads_int8"):
            rows = getattr(self, name)
            setattr(part, name, None if rows is None else rows[begin:end])
        part.branch = (part.x, None)  # only ranks have parts, and they add in their norms
        part.mlp_rows, part.channel = min(self.mlp_rows, end - begin), channel
        return part


def scratch_bytes(config: ModelConfig, placement: Placement, num_tokens: int, **switches: bool) -> tuple[int, int]:
    """What a Scratch takes of shared memory and of its own, found by laying one out in no memory."""
    nowhere = torch.empty(1 << 62, dtype=torch.uint8, device="meta")
    scratch = Scratch(config, placement, nowhere, nowhere, num_tokens, **switches)
    return scratch.num_shared_bytes, scratch.num_bytes


class ScratchPool:
    """Hands out a Scratch per number of tokens; the memory below grows and never shrinks.

    Args:
        communicator: gives the memory that all ranks see; None: there is one rank.
        switches: branches_add and has_gate_up of each Scratch.
    """

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        communicator: Communicator | None = None,
        **switches: bool,
    ) -> None:
        self._config, self._placement, self._switches = config, placement, switches
        self._empty_shared = self._empty if communicator is None else communicator.empty
        self._shared = self._base = self._empty(0)
        self._views: dict[int, Scratch] = {}

    def get(self, num_tokens: int) -> Scratch:
        views = self._views.get(num_tokens)
        if views is None:
            shared_bytes, num_bytes = scratch_bytes(self._config, self._placement, num_tokens, **self._switches)
            if self._shared.numel() < shared_bytes:  # on all ranks, or on none: they run the same steps
                self._shared = self._empty_shared(shared_bytes)
                self._views.clear()
            if self._base.numel() < num_bytes:
                self._base = self._empty(num_bytes)
                self._views.clear()
            views = Scratch(self._config, self._placement, self._shared, self._base, num_tokens, **self._switches)
            self._views[num_tokens] = views
        return views

    def _empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._placement.device)
