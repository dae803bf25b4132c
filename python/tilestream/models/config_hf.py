"""ModelConfig from a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tilestream.layers.rope import ROPE_TYPES, RopeConfig
from tilestream.models.config import FAMILIES, ModelConfig
from tilestream.models.errors import ModelLoadError

# config.json's model_type -> family. Other types that share a decoder would need a reference test first.
_MODEL_TYPES = {name: name for name in FAMILIES} | {"gemma3_text": "gemma3"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
_GEMMA3_WINDOW = 4096  # transformers' default, for configs that leave it out
_REQUIRED = object()


class _Fields:
    """Typed access to config.json, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def number(self, key: str, default: Any = _REQUIRED, *, integer: bool = False) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelLoadError(f"{self.source}: the key {key!r} is missing")
            return default
        allowed = int if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
            kind = "an integer" if integer else "a finite number"
            raise ModelLoadError(f"{self.source}: {key} is {value!r}; it must be {kind}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.number(key, default, integer=True)

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.values.get(key) or []
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            raise ModelLoadError(f"{self.source}: {key} is {values!r}; it must be a list of numbers")
        return tuple(float(value) for value in values)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ModelLoadError(f"{self.source}: {key} is {value!r}; it must be an object")
        return value


def config_from_hf(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a model's shape from a parsed config.json.

    Args:
        values: the parsed file. Gemma 3's multimodal configs are read through their `text_config`.
        source: file name for error messages.
    Returns:
        The validated configuration; `tied_embeddings` may still turn True when the checkpoint has no lm_head.
    Raises:
        ModelLoadError: unknown model type, or a key that is missing, of a wrong type or out of range.
    """
    family, fields = _family_and_fields(values, source)
    num_layers, hidden = fields.integer("num_hidden_layers"), fields.integer("hidden_size")
    num_qo_heads = fields.integer("num_attention_heads")
    if num_qo_heads <= 0 or not 0 < num_layers < 2**16:
        raise ModelLoadError(
            f"{source}: num_attention_heads is {num_qo_heads}, num_hidden_layers is {num_layers}; "
            "both must be positive"
        )
    head_dim = fields.integer("head_dim", hidden // num_qo_heads)
    gemma = family == "gemma3"
    activation = fields.values.get("hidden_activation" if gemma else "hidden_act") or (
        "gelu_pytorch_tanh" if gemma else "silu")
    if activation not in _ACTIVATIONS:
        raise ModelLoadError(f"{source}: activation is {activation!r}; supported: {', '.join(_ACTIVATIONS)}")
    scale_dim = fields.number("query_pre_attn_scalar", 256) if gemma else head_dim
    if scale_dim <= 0:
        raise ModelLoadError(f"{source}: the head size that scales attention is {scale_dim}; it must be positive")
    rope, rope_local = _ropes(fields, head_dim, gemma)
    return ModelConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden,
        num_qo_heads=num_qo_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_qo_heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings", 131072 if gemma else 2048),
        rms_eps=float(fields.number("rms_norm_eps", 1e-6)),
        rope=rope,
        rope_local=rope_local,
        window_left=_windows(fields, family, num_layers),
        sm_scale=scale_dim**-0.5,
        logits_soft_cap=float(fields.number("attn_logit_softcapping", 0.0)),
        final_soft_cap=float(fields.number("final_logit_softcapping", 0.0)),
        embedding_scale=hidden**0.5 if gemma else 1.0,
        activation=_ACTIVATIONS[activation],
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        tied_embeddings=bool(fields.values.get("tie_word_embeddings", gemma)),
    ).validate(source)


def _family_and_fields(values: Mapping[str, Any], source: str) -> tuple[str, _Fields]:
    """The model's family, and where the text decoder's keys are."""
    if not isinstance(values, Mapping):
        raise ModelLoadError(f"{source}: the top level is {type(values).__name__}; it must be an object")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ModelLoadError(f"{source}: model_type is {model_type!r}; supported: {', '.join(sorted(_MODEL_TYPES))}")
    fields = _Fields(values, source)
    if isinstance(values.get("text_config"), Mapping):
        fields = _Fields(_gemma3_text_defaults() | dict(values["text_config"]), f"{source} (text_config)")
    return _MODEL_TYPES[model_type], fields


def _gemma3_text_defaults() -> dict[str, Any]:
    """Keys that the published multimodal Gemma 3 configs leave out of text_config (transformers' defaults)."""
    return {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256}


def _windows(fields: _Fields, family: str, num_layers: int) -> tuple[int, ...]:
    """Per layer: sliding_window - 1 (a window of W tokens reaches W - 1 back), or -1."""
    window = fields.integer("sliding_window", _GEMMA3_WINDOW if family == "gemma3" else None)
    layer_types = fields.values.get("layer_types")
    if layer_types is not None:
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelLoadError(
                f"{fields.source}: layer_types has {sorted(unknown)}; supported: full_attention, sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in layer_types]
    elif family == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 6)
        if pattern <= 0:
            raise ModelLoadError(f"{fields.source}: sliding_window_pattern is {pattern}; it must be positive")
        sliding = [(i + 1) % pattern != 0 for i in range(num_layers)]
    elif family in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 0)
        sliding = [bool(fields.values.get("use_sliding_window")) and i >= first for i in range(num_layers)]
    else:
        sliding = [family == "mistral"] * num_layers
    if window is None:
        if layer_types is not None and any(sliding):
            raise ModelLoadError(f"{fields.source}: layer_types has sliding_attention, but sliding_window is missing")
        return (-1,) * len(sliding)
    if window <= 0:
        raise ModelLoadError(f"{fields.source}: sliding_window is {window}; it must be at least 1")
    return tuple(window - 1 if slides else -1 for slides in sliding)


def _ropes(fields: _Fields, head_dim: int, gemma: bool) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of full-attention and of sliding layers, from `rope_parameters` or the older rope_theta/rope_scaling."""
    parameters = fields.mapping("rope_parameters")
    if gemma:
        nested = _Fields(parameters, fields.source)
        full = {"rope_theta": fields.number("rope_theta", 1e6), **fields.mapping("rope_scaling"),
                **nested.mapping("full_attention")}
        local = {"rope_theta": fields.number("rope_local_base_freq", 1e4), **nested.mapping("sliding_attention")}
        return _rope(full, fields, head_dim), _rope(local, fields, head_dim)
    flat = {"rope_theta": fields.number("rope_theta", 1e4),
            "partial_rotary_factor": fields.number("partial_rotary_factor", 1.0),
            **fields.mapping("rope_scaling"), **parameters}
    rope = _rope(flat, fields, head_dim)
    return rope, rope


def _rope(values: Mapping[str, Any], fields: _Fields, head_dim: int) -> RopeConfig:
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelLoadError(
            f"{fields.source}: RoPE scaling is {rope_type!r}; supported: {', '.join(ROPE_TYPES)}"
        )
    rope = _Fields(values, f"{fields.source} (RoPE)")
    original = rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings", 0))
    factor = rope.number("factor", None)
    if factor is None:
        needs_factor = rope_type != "default"
        factor = fields.integer("max_position_embeddings") / original if needs_factor and original > 0 else 1.0
    attention_factor = rope.number("attention_factor", None)
    mscale, mscale_all = rope.number("mscale", None), rope.number("mscale_all_dim", None)
    if rope_type == "yarn" and attention_factor is None and mscale and mscale_all and factor > 1:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return RopeConfig(
        theta=float(rope.number("rope_theta")),
        rotary_dim=int(head_dim * rope.number("partial_rotary_factor", 1.0)),
        rope_type=rope_type,
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(rope.number("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.number("high_freq_factor", 4.0)),
        beta_fast=float(rope.number("beta_fast", 32.0)),
        beta_slow=float(rope.number("beta_slow", 1.0)),
        attention_factor=attention_factor,
        truncate=bool(values.get("truncate", True)),
        freq_factors=rope.numbers("freq_factors"),
    )
