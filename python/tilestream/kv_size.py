"""How much memory the KV cache takes, and how much it may take where nobody says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from tilestream.ops.kv_cache import KV_DTYPES

if TYPE_CHECKING:
    from tilestream.models.config import ModelConfig

# Without a --kv-cache-tokens: this share of the memory that is free, and no more than this many full contexts.
_KV_MEMORY_SHARE = 0.25
_KV_GPU_MEMORY_SHARE = 0.9  # of what the weights leave; the rest is for activations and captured graphs
_KV_MAX_CONTEXTS = 16


def element_bytes(kv_dtype: str) -> float:
    """Of one value in the KV cache, scales aside."""
    return 0.5 if kv_dtype == "int4" else KV_DTYPES[kv_dtype].itemsize


def kv_token_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """What a token takes in the KV cache, over all layers."""
    scale_bytes = 4 if kv_dtype in ("int8", "int4") else 0
    return int(config.num_layers * config.num_kv_heads * 2 * (config.head_dim * element_bytes(kv_dtype) + scale_bytes))


def default_kv_cache_tokens(
    config: ModelConfig, kv_dtype: str, page_size: int, device: torch.device, num_ranks: int = 1
) -> int:
    """A share of the memory that is free on `device`, which so many ranks of a model have together; at least one page."""
    if device.type == "cpu":
        room_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _KV_MEMORY_SHARE
    else:
        room_bytes = torch.cuda.mem_get_info(device)[0] * _KV_GPU_MEMORY_SHARE
    tokens = min(int(room_bytes / num_ranks / kv_token_bytes(config, kv_dtype)), _KV_MAX_CONTEXTS * config.max_position)
    return max(tokens, page_size)
