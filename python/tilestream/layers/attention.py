"""Self-attention of one layer over the paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilestream.layers.linear import Linear, StackedLinear
from tilestream.layers.norm import RmsNorm
from tilestream.layers.rope import RopeTable
from tilestream.ops.append_kv import KeyRounding
from tilestream.ops.kv_cache import KvCache
from tilestream.ops.quantise import QuantisedRows

if TYPE_CHECKING:
    from tilestream.engine.batch import StepInputs
    from tilestream.layers.scratch import Scratch


class Attention:
    """o(attend(rope(norm(q(x))), rope(norm(k(x))), v(x))).

    Args:
        qkv: q's, k's and v's rows in one projection.
        o: output projection.
        q_norm, k_norm: per-head norms before RoPE, or None.
        rope: this layer's RoPE table, shared with the layers that rotate alike.
        window_left: greatest distance a query looks back; -1: no limit. Picks the step's plan.
        sm_scale: multiplies q . k.
        logits_soft_cap: soft cap of the scores; 0: off.
        key_rounding: how 4-bit caches round this layer's keys; None: every element to the nearest.

    `unified_max` may be set afterwards, from calibration (tilestream.calibrate), before the first step.
    """

    def __init__(
        self,
        qkv: Linear | StackedLinear,
        o: Linear,
        *,
        q_norm: RmsNorm | None,
        k_norm: RmsNorm | None,
        rope: RopeTable,
        window_left: int,
        sm_scale: float,
        logits_soft_cap: float,
        key_rounding: KeyRounding | None = None,
    ) -> None:
        self.qkv, self.o, self.q_norm, self.k_norm = qkv, o, q_norm, k_norm
        self.rope, self.interleaved, self.window_left = rope, rope.config.interleaved, window_left
        self.sm_scale, self.logits_soft_cap = sm_scale, logits_soft_cap
        self.unified_max: float | None = None
        self.key_rounding = key_rounding
        self._rounding = (key_rounding.offset, key_rounding.order, key_rounding.feedback) if key_rounding else ()
        self._append, self._attend = torch.ops.tilestream.append_kv.default, torch.ops.tilestream.attention.default
        self._quantise = torch.ops.tilestream.quantise.default

    def __call__(
        self, x: torch.Tensor | QuantisedRows, buf: Scratch, step: StepInputs, cache: KvCache
    ) -> None:
        """Writes the attention's output for x, the normalised rows, into buf.branch; appends their keys and values."""
        q, k, k_cache, v_cache, scales = buf.q, buf.k, cache.k_cache, cache.v_cache, cache.kv_scales
        self.qkv(x, buf.qkv)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q)
            self.k_norm(k)
        self._append(
            q, k, buf.v, self.rope.table, step.positions, step.slot_mapping, k_cache, v_cache, scales, None,
            *(self._rounding if cache.int4 else ()), interleaved=self.interleaved, k_scale=cache.k_scale, v_scale=cache.v_scale,
            blocked=cache.blocked, int4=cache.int4,
        )
        plan = step.plans[self.window_left]
        self._attend(
            q, k_cache, v_cache, scales, step.block_table, plan.plan, plan.host_plan, plan.workspace, buf.heads,
            None, None, None, sm_scale=self.sm_scale, logits_soft_cap=self.logits_soft_cap,
            k_scale=cache.k_scale, v_scale=cache.v_scale, blocked=cache.blocked, int4=cache.int4,
            unified_max=self.unified_max,
        )
        if self.o.k4 and buf.heads_int8 is not None:
            rows = buf.heads_int8.with_k4(self.o.k4)
            self._quantise(buf.heads_flat, rows.q, rows.scale, rows.sum)
            self.o(rows, *buf.branch)
        else:
            self.o(buf.heads_flat, *buf.branch)
