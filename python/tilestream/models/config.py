"""What a decoder looks like. config_hf reads it from a Hugging Face config.json, config_gguf from GGUF metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilestream.layers.rope import RopeConfig
from tilestream.models.errors import ModelLoadError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder-only model.

    Attributes:
        family: one of FAMILIES.
        window_left: per layer, the greatest distance a query looks back; -1: no limit.
        rope, rope_local: of layers without and with a window (equal but for Gemma).
        sm_scale: multiplies q . k.
        logits_soft_cap: soft cap of attention scores, 0: off.
        final_soft_cap: soft cap of the output logits, 0: off.
        embedding_scale: multiplies token embeddings.
        activation: "silu" or "gelu_tanh".
        qk_norm: q and k heads are RMS-normalised before RoPE.
        post_norms: attention and MLP outputs are normalised before they join the residual stream.
        tied_embeddings: the output projection is the embedding table.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_eps: float
    rope: RopeConfig
    rope_local: RopeConfig
    window_left: tuple[int, ...]
    sm_scale: float
    logits_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    qk_norm: bool = False
    post_norms: bool = False
    tied_embeddings: bool = False

    @property
    def qo_size(self) -> int:
        return self.num_qo_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layer_rope(self, layer_idx: int) -> RopeConfig:
        return self.rope if self.window_left[layer_idx] < 0 else self.rope_local

    def validate(self, source: str) -> ModelConfig:
        """Returns self, or raises ModelLoadError naming `source`, the field, its value and what is allowed."""
        for name in ("num_layers", "hidden_size", "num_qo_heads", "num_kv_heads", "head_dim", "intermediate_size",
                     "vocab_size", "max_position"):
            value = getattr(self, name)
            if not 0 < value < 2**31:
                raise ModelLoadError(f"{source}: {name} is {value}; it must be between 1 and 2^31 - 1")
        if self.num_qo_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"{source}: num_qo_heads is {self.num_qo_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 16 or self.head_dim > 256:
            raise ModelLoadError(f"{source}: head_dim is {self.head_dim}; supported: multiples of 16 up to 256")
        if not 0.0 < self.rms_eps < 1.0:
            raise ModelLoadError(f"{source}: rms_eps is {self.rms_eps}; it must be between 0 and 1")
        if len(self.window_left) != self.num_layers:
            raise ModelLoadError(
                f"{source}: {len(self.window_left)} layers have an attention type, the model has {self.num_layers}"
            )
        if any(window < -1 for window in self.window_left):
            raise ModelLoadError(f"{source}: sliding window is {min(self.window_left) + 1}; it must be at least 1")
        for rope in (self.rope, self.rope_local):
            self._validate_rope(source, rope)
        return self

    def _validate_rope(self, source: str, rope: RopeConfig) -> None:
        if not 0 < rope.rotary_dim <= self.head_dim or rope.rotary_dim % 2:
            raise ModelLoadError(
                f"{source}: RoPE rotates {rope.rotary_dim} elements of a head; "
                f"it must be even and at most head_dim, {self.head_dim}"
            )
        if not (rope.theta > 1.0 and rope.factor > 0.0):
            raise ModelLoadError(
                f"{source}: RoPE theta is {rope.theta} and factor is {rope.factor}; allowed: theta > 1, factor > 0"
            )
        if rope.rope_type in ("llama3", "yarn") and rope.original_max_position <= 0:
            raise ModelLoadError(
                f"{source}: RoPE scaling {rope.rope_type!r} needs the original context length; "
                f"it is {rope.original_max_position}"
            )
        if not 0.0 < rope.low_freq_factor < rope.high_freq_factor:
            raise ModelLoadError(
                f"{source}: RoPE low_freq_factor is {rope.low_freq_factor}, high_freq_factor is "
                f"{rope.high_freq_factor}; allowed: 0 < low < high"
            )
        if rope.freq_factors and len(rope.freq_factors) != rope.rotary_dim // 2:
            raise ModelLoadError(
                f"{source}: {len(rope.freq_factors)} RoPE frequency factors; expected {rope.rotary_dim // 2}"
            )
        if not all(0.0 < factor < math.inf for factor in rope.freq_factors):
            raise ModelLoadError(f"{source}: a RoPE frequency factor is not positive and finite")
