"""A model's config.json in Hugging Face's words, whatever file the model came from."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tilestream.layers.rope import RopeConfig
from tilestream.models.config import ModelConfig
from tilestream.models.config_hf import config_from_hf
from tilestream.models.errors import ModelLoadError
from tilestream.models.hf_checkpoint import read_json

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                  "qwen3": "Qwen3ForCausalLM", "gemma3": "Gemma3ForCausalLM"}


def config_json(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The config.json of the model at `path`: a directory's own, or one that means what a GGUF file's metadata does.

    Args:
        path: the GGUF file or the directory.
        config: its shape, RoPE of halves.
    Raises:
        ModelLoadError: the metadata says what config.json has no words for.
    """
    if path.is_dir():
        return dict(read_json(path / "config.json"))
    values = _words(config)
    # Whether token embeddings are tied in the new file is said there.
    read, meant = (
        replace(c, tied_embeddings=False, rope=_that_matters(c.rope), rope_local=_that_matters(c.rope_local))
        for c in (config_from_hf(values, str(path)), config)
    )
    differing = [field.name for field in fields(read) if getattr(read, field.name) != getattr(meant, field.name)]
    if differing:
        raise ModelLoadError(f"{path}: a Hugging Face config.json cannot express this file's {', '.join(differing)}")
    return values


def _that_matters(rope: RopeConfig) -> RopeConfig:
    """Without the trained context where the frequencies do not depend on it."""
    return rope if rope.rope_type in ("llama3", "yarn") else replace(rope, original_max_position=0)


def _words(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": "gemma3_text" if config.family == "gemma3" else config.family,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_qo_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_eps,
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
    }
    rope = _rope_words(config.rope, config.head_dim)
    if config.family == "gemma3":
        values |= {
            "hidden_activation": values.pop("hidden_act"),
            "query_pre_attn_scalar": config.sm_scale**-2,
            "rope_parameters": {"full_attention": rope, "sliding_attention": _rope_words(config.rope_local, config.head_dim)},
        }
    else:
        values["rope_parameters"] = rope
    windows = {window for window in config.window_left if window >= 0}
    if windows:
        values["sliding_window"] = max(windows) + 1
        values["layer_types"] = ["full_attention" if w < 0 else "sliding_attention" for w in config.window_left]
    return values


def _rope_words(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    words: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.theta}
    if rope.rotary_dim != head_dim:
        words["partial_rotary_factor"] = rope.rotary_dim / head_dim
    if rope.rope_type != "default":
        words |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_position}
    if rope.attention_factor is not None:
        words["attention_factor"] = rope.attention_factor
    if rope.freq_factors:  # which Hugging Face has no word for; config_hf.py reads it
        words["freq_factors"] = list(rope.freq_factors)
    return words
