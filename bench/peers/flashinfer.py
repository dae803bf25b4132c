"""FlashInfer's decode over the same pages as ours, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from tilestream.ops import KvCache

_WORKSPACE_BYTES = 256 << 20


def paged_decode(
    q: torch.Tensor, caches: Sequence[KvCache], block_table: torch.Tensor, kv_len: int
) -> dict[str, Callable[[int], torch.Tensor]]:
    """{"FlashInfer": decode of q [batch_size, heads, dim] over caches[i], bfloat16, all requests kv_len tokens long}, or {}."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    import flashinfer

    num_kv_heads, page_size, head_dim = caches[0].k_cache.shape[1:]
    batch_size, pages_each = block_table.shape
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * pages_each,
        block_table.flatten(),
        torch.full((batch_size,), (kv_len - 1) % page_size + 1, dtype=torch.int32, device=q.device),
        q.size(1), num_kv_heads, head_dim, page_size, q_data_type=q.dtype, kv_data_type=caches[0].k_cache.dtype,
    )  # fmt: skip
    return {"FlashInfer": lambda i: wrapper.run(q, (caches[i].k_cache, caches[i].v_cache))}
