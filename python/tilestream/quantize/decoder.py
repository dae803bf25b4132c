"""A float32 decoder layer in plain torch, whose inputs can be watched or rounded: what calibration runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilestream.models.config import ModelConfig
from tilestream.quantize.source import LayerWeights
from tilestream.quantize.transform import turn_blocks
from tilestream.reference.attention import visible

# (name of INPUTS, its rows) -> the rows that the linears read.
Watch = Callable[[str, torch.Tensor], torch.Tensor]
# Queries and keys after RoPE and values, [windows, heads, tokens, head_dim] -> the keys and values that attention sees.
Heads = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _pass(name: str, rows: torch.Tensor) -> torch.Tensor:
    return rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class Decoder:
    """Runs single layers over windows of one length.

    Args:
        config: the model's shape, RoPE of halves.
        num_tokens: of a window.
    """

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        self.config, self._num_tokens = config, num_tokens
        self._ropes = {rope: rope.cos_sin_table(num_tokens).chunk(2, 1) for rope in {config.rope, config.rope_local}}
        self._masks = {
            window: visible(num_tokens, num_tokens, causal=True, window_left=window) for window in set(config.window_left)
        }

    def layer(
        self,
        layer_idx: int,
        weights: LayerWeights,
        x: torch.Tensor,
        watch: Watch | None = None,
        heads: Heads | None = None,
        outputs: Watch | None = None,
    ) -> torch.Tensor:
        """The residual stream behind a layer.

        Args:
            layer_idx: picks RoPE and window.
            weights: of the layer.
            x: [windows, num_tokens, hidden], the residual stream before it.
            watch: sees, and may round, what linears read.
            heads: sees, and may round, what attention reads.
            outputs: sees what linears give, by the names of LINEARS.
        """
        config, norm, eps = self.config, weights.norm, self.config.rms_eps
        watch, outputs = watch or _pass, outputs or _pass

        def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
            return outputs(name, F.linear(rows, weights.linear[name], weights.bias.get(name)))

        rows = watch("qkv", rms_norm(x, norm["attn"], eps))
        q, k, v = (linear(name, rows).unflatten(2, (-1, config.head_dim)).transpose(1, 2) for name in "qkv")
        branch = linear("o", watch("o", self._attention(layer_idx, norm, q, k, v, heads)))
        x = x + (rms_norm(branch, norm["post_attn"], eps) if config.post_norms else branch)
        rows = watch("gate_up", rms_norm(x, norm["mlp"], eps))
        gate, up = linear("gate", rows), linear("up", rows)
        gate = F.silu(gate) if config.activation == "silu" else F.gelu(gate, approximate="tanh")
        inner = turn_blocks(gate * up) if weights.down_hadamard else gate * up
        branch = linear("down", watch("down", inner))
        return x + (rms_norm(branch, norm["post_mlp"], eps) if config.post_norms else branch)

    def _attention(
        self,
        layer_idx: int,
        norm: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: Heads | None,
    ) -> torch.Tensor:
        config = self.config
        if config.qk_norm:
            q, k = rms_norm(q, norm["q"], config.rms_eps), rms_norm(k, norm["k"], config.rms_eps)
        q, k = self._rotate(layer_idx, q), self._rotate(layer_idx, k)
        if heads is not None:
            k, v = heads(q, k, v)
        if config.logits_soft_cap:
            out = self.attention(layer_idx, q, k) @ v.repeat_interleave(q.size(1) // v.size(1), 1)
        else:
            mask = self._masks[config.window_left[layer_idx]]
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=config.sm_scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def attention(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The probabilities, [windows, num_qo_heads, num_tokens, num_tokens]."""
        config = self.config
        logits = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).transpose(2, 3) * config.sm_scale
        if cap := config.logits_soft_cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.masked_fill(~self._masks[config.window_left[layer_idx]], -math.inf).softmax(-1)

    def _rotate(self, layer_idx: int, x: torch.Tensor) -> torch.Tensor:
        rope = self.config.layer_rope(layer_idx)
        cos, sin = self._ropes[rope]
        a, b, kept = x.split([rope.rotary_dim // 2, rope.rotary_dim // 2, x.size(3) - rope.rotary_dim], -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, kept], -1)
