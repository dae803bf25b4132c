"""Tiny GGUF files, written with the gguf package from transformers' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
                 "gemma3": gguf.MODEL_ARCH.GEMMA3}


def byte_level_tokens(num: int) -> list[str]:
    """<eos>, <bos>, the byte alphabet, one merged token, and fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<eos>", "<bos>", *alphabet, "ab", *(f"filler{i}" for i in range(num - 259))]


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, num_tokens: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_level_tokens(num_tokens))
    writer.add_token_types([3, 3] + [1] * (num_tokens - 2))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights(architecture: str, model) -> dict[str, np.ndarray]:
    """A transformers model's weights under GGUF's names, laid out as llama.cpp's converter does."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    weights = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values += 1.0
        weights[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return weights


def write_model(
    path: Path,
    architecture: str,
    model,
    *,
    kind: Callable[[str], Type] = lambda name: Type.F32,
    fields: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray] = {},
) -> Path:
    """Write `model` as a GGUF file.

    Args:
        kind: GGUF type of a weight matrix by its name; vectors stay F32.
        fields: metadata beside, or instead of, what the configuration gives; None leaves a key out.
        extra: further float32 tensors.
    """
    c = model.config
    values: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": getattr(c, "head_dim", None),
        "attention.value_length": getattr(c, "head_dim", None),
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
    } | dict(fields)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
            add[type(value)](f"{architecture}.{key}", value)
    add_byte_level_tokenizer(writer, c.vocab_size)
    for name, array in (gguf_weights(architecture, model) | dict(extra)).items():
        chosen = kind(name) if array.ndim == 2 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)
    finish(writer)
    return path


def quantise_model(architecture: str, model, kind: Callable[[str], Type]) -> None:
    """Replace the model's weight matrices by what is left of them after quantisation to GGUF types, in place.

    Rows of blocks survive the converter's row permutation, so quantising before or after it is the same.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                chosen = kind(names.get_name(name, try_suffixes=(".weight", ".bias")))
                blocks = gguf.quants.quantize(parameter.numpy(), chosen)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, chosen)))
