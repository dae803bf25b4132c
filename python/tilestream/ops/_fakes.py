"""Fake (meta) kernels: every op writes into tensors it is given and returns nothing, so shapes need no rule."""

from __future__ import annotations

import torch

OPS = (
    "attention",
    "merge_states",
    "append_kv",
    "gather_kv",
    "linear",
    "linear_quant",
    "pack_gguf",
    "pack_weight",
    "embedding",
    "rms_norm",
    "rms_norm_quant",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant",
    "silu_and_mul",
    "silu_and_mul_quant",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_quant",
    "quantise",
    "hadamard",
    "sample",
    "shard_histogram",
    "shard_masses",
    "shard_draw",
    "allreduce_rmsnorm",
)

for _name in OPS:
    torch.library.register_fake(f"tilestream::{_name}", lambda *args, **kwargs: None)
