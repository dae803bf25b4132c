"""Tiny random models of every family, saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

VOCAB_SIZE = 300
_SHAPE = dict(
    vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=0,
    pad_token_id=None,
)
_LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)
_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
_GEMMA_ROPE = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                   sliding_attention=dict(rope_type="default", rope_theta=1e4))

# name -> (transformers' config class, arguments beside _SHAPE)
HF_MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama-wide-mlp": ("LlamaConfig", dict(intermediate_size=512, attention_bias=True, mlp_bias=True)),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama-llama3-rope": ("LlamaConfig", dict(rope_parameters=_LLAMA3)),
    "llama-linear-rope": ("LlamaConfig", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama-odd-sizes": ("LlamaConfig", dict(hidden_size=144, num_attention_heads=3, num_key_value_heads=1,
                                            head_dim=80, intermediate_size=200, vocab_size=301)),
    "mistral": ("MistralConfig", dict(sliding_window=21)),
    "qwen2": ("Qwen2Config", dict(head_dim=None, num_attention_heads=2, num_key_value_heads=1,
                                  rope_parameters=_YARN)),
    "qwen2-window": ("Qwen2Config", dict(head_dim=None, num_attention_heads=2, num_key_value_heads=1,
                                         use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=True)),
    "gemma3": ("Gemma3TextConfig", dict(sliding_window=19, query_pre_attn_scalar=96, rope_parameters=_GEMMA_ROPE,
                                        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3-deep": ("Gemma3TextConfig", dict(num_hidden_layers=7, sliding_window=19, query_pre_attn_scalar=64,
                                             rope_parameters=_GEMMA_ROPE)),
    "gemma3-soft-cap": ("Gemma3TextConfig", dict(final_logit_softcapping=3.0)),
    "llama-untied": ("LlamaConfig", dict(vocab_size=320, tie_word_embeddings=False)),
}


def save_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level tokenizer.json with `vocab_size` ids: <eos>, <bos>, the 256 bytes, fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<eos>", "<bos>", *alphabet, *(f"<filler{i}>" for i in range(vocab_size - 258))]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>"])
    backend.save(str(path / "tokenizer.json"))


def build_hf_model(name: str):
    """A seeded float32 model of HF_MODELS with weights and norms large enough to matter."""
    import transformers

    config_class, arguments = HF_MODELS[name]
    shape = {key: value for key, value in (_SHAPE | arguments).items() if value is not None}
    config = getattr(transformers, config_class)(**shape)
    config._attn_implementation = "eager"
    torch.manual_seed(list(HF_MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in parameter_name or "bias" in parameter_name else 0.12
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(parameter + noise if "norm" in parameter_name else noise)
    return model


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """name -> (transformers model, its directory), built once."""
    built: dict[str, tuple] = {}

    def get(name: str):
        if name not in built:
            path = tmp_path_factory.mktemp(name)
            model = build_hf_model(name)
            model.save_pretrained(path)
            save_tokenizer(path, model.config.vocab_size)
            built[name] = model, path
        return built[name]

    return get
