"""A layer of the decoder, in stages: norms, in which ranks communicate, then computation, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tilestream.layers.attention import Attention
from tilestream.layers.linear import Linear, StackedLinear
from tilestream.layers.mlp import GatedMlp
from tilestream.layers.norm import RmsNorm
from tilestream.layers.scratch import Scratch
from tilestream.ops.kv_cache import KvCache
from tilestream.ops.quantise import QuantisedRows

if TYPE_CHECKING:
    from tilestream.engine.batch import StepInputs


class DecoderLayer:
    """One layer. With post norms (Gemma) each branch is normalised again before it joins the residual stream."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMlp,
        *,
        attn_norm: RmsNorm,
        mlp_norm: RmsNorm,
        post_attn_norm: RmsNorm | None,
        post_mlp_norm: RmsNorm | None,
    ) -> None:
        self.attention, self.mlp = attention, mlp
        self.attn_norm, self.mlp_norm = attn_norm, mlp_norm
        self.post_attn_norm, self.post_mlp_norm = post_attn_norm, post_mlp_norm

    def stages(self, buf: Scratch, step: StepInputs, cache: KvCache) -> Iterator[None]:
        """The layer, which yields where norms, in which ranks communicate, and computation take turns."""
        x, residual, channel = buf.x, buf.residual, buf.channel
        normed = self.attn_norm.add(x, residual, rows_for(self.attention.qkv, buf), channel=channel)
        yield
        self.attention(normed, buf, step, cache)
        yield
        if self.post_attn_norm is not None:
            self.post_attn_norm(x, channel=channel)
        normed = self.mlp_norm.add(x, residual, rows_for(self.mlp.gate_up, buf), channel=channel)
        yield
        self.mlp(normed, buf)
        yield
        if self.post_mlp_norm is not None:
            self.post_mlp_norm(x, channel=channel)


def rows_for(reader: Linear | StackedLinear, buf: Scratch) -> QuantisedRows | None:
    """Where a norm writes the integers that `reader` takes; None if it takes floats."""
    return buf.x_int8.with_k4(reader.k4) if reader.takes_int8 and buf.x_int8 is not None else None
