"""A checkpoint's weights as float32, in one layout whatever file they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gguf
import torch

from tilestream.layers.rope import RopeConfig
from tilestream.models.checkpoint import Checkpoint
from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError

# The four inputs that a layer's linears read, and who reads them.
INPUTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
LINEARS = tuple(name for names in INPUTS.values() for name in names)
STEMS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
NORMS = {"attn": "attn_norm", "mlp": "ffn_norm", "q": "attn_q_norm", "k": "attn_k_norm", "post_attn": "post_attention_norm",
         "post_mlp": "post_ffw_norm"}
_FOUR_BIT = (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1)


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer. RoPE pairs elements (i, i + rotary_dim / 2) of a head.

    Attributes:
        linear: [n, k] float32, by the names of LINEARS.
        bias: [n] float32, of those linears that have one.
        norm: float32 vectors by the names of NORMS, of those that the family has.
        down_hadamard: what `down` reads is multiplied by Hadamard matrices of 128 channels first.
    """

    linear: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor]
    norm: dict[str, torch.Tensor]
    down_hadamard: bool = False


class Source:
    """Reads float weights out of a checkpoint, a layer at a time. NaN and infinity are a ModelLoadError.

    Args:
        checkpoint: where tensors come from.
        config: the model's shape as the checkpoint's own reader gives it.
    Attributes:
        config: the same with RoPE of halves, which is how layers come out of here.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._interleaved = checkpoint, config.rope.interleaved
        self.config = replace(config, rope=_halves(config.rope), rope_local=_halves(config.rope_local))

    @property
    def is_four_bit(self) -> bool:
        """Whether its linears are 4-bit codes in groups of 32, which a directory can keep as they are."""
        return self._checkpoint.tensor(f"blk.0.{STEMS['gate']}.weight").type in _FOUR_BIT

    def matrix(self, name: str) -> torch.Tensor:
        raw = self._checkpoint.tensor(name + ".weight")
        return _finite(torch.from_numpy(gguf.quants.dequantize(raw.rows.numpy(), raw.type).copy()), name + ".weight")

    def vector(self, name: str) -> torch.Tensor:
        return _finite(self._checkpoint.vector(name), name)

    def layer(self, layer_idx: int) -> LayerWeights:
        prefix, has = f"blk.{layer_idx}.", self._checkpoint.has_tensor
        linear = {name: self.matrix(prefix + STEMS[name]) for name in LINEARS}
        bias = {name: self.vector(f"{prefix}{STEMS[name]}.bias") for name in LINEARS if has(f"{prefix}{STEMS[name]}.bias")}
        norm = {name: self.vector(f"{prefix}{stem}.weight") for name, stem in NORMS.items() if has(f"{prefix}{stem}.weight")}
        if self._interleaved:
            for tensors in (linear, bias):
                for name in ("q", "k"):
                    if name in tensors:
                        tensors[name] = self._to_halves(tensors[name])
        return LayerWeights(linear, bias, norm)

    def _to_halves(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of pairs (2i, 2i + 1) put where pairs (i, i + rotary_dim / 2) are rotated."""
        heads = rows.unflatten(0, (-1, self.config.head_dim))
        rotary_dim = self.config.rope.rotary_dim
        turned, kept = heads[:, :rotary_dim], heads[:, rotary_dim:]
        return torch.cat([turned[:, 0::2], turned[:, 1::2], kept], 1).flatten(0, 1)


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    if not values.isfinite().all():
        raise ModelLoadError(f"{name} holds NaN or infinity; a model can be quantised only from finite weights")
    return values


def _halves(rope: RopeConfig) -> RopeConfig:
    return replace(rope, interleaved=False)
