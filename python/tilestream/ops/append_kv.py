"""Rotary embedding and the write into the paged KV cache; and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestream.ops.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class KeyRounding:
    """How the keys of a layer become 4-bit codes: one element after another, each error made up for by the elements behind it.

    A logit is q . k, so what an error e of a key costs is e^T E[q q^T] e: what one element has done, others can partly undo.
    As GPTQ (2210.17323) rounds a weight's columns by the Hessian of its inputs, this rounds a key's elements by the second
    moment of the queries. Nothing that reads the cache knows of it.

    Attributes:
        offset: [num_kv_heads, head_dim], float32, taken from rotated keys. It shifts all logits of a query by the same, so
            softmax does not see it (SageAttention, 2410.02367); zeros where logits are capped or meet attention sinks.
        order: [num_kv_heads, head_dim], int32: each head's elements in the order of their rounding.
        feedback: [num_kv_heads, head_dim, head_dim], float32, in that order: of the i-th element's error, times row i is taken
            from those behind it.
    """

    offset: torch.Tensor
    order: torch.Tensor
    feedback: torch.Tensor


def append_kv(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: KvCache,
    *,
    cos_sin: torch.Tensor | None = None,
    interleaved: bool = False,
    key_stats: torch.Tensor | None = None,
    key_rounding: KeyRounding | None = None,
) -> None:
    """Rotate q in place, rotate k, quantise k and v as the cache stores them, and write their pages: one pass.

    Args:
        q: [num_tokens, num_qo_heads, head_dim], float32, float16 or bfloat16; rotated in place; or None.
        k: [num_tokens, num_kv_heads, head_dim], as q; v: [num_tokens, num_kv_heads, head_dim_vo], as k.
        positions: [num_tokens], int32, rows of cos_sin.
        slot_mapping: [num_tokens], int32, page * page_size + offset; -1 writes nothing.
        kv_cache: written in place. int8 and int4: asymmetric per token and head, value = q * scale + zero; fp8: k / k_scale
            and v / v_scale to the nearest e4m3, at most 448 in magnitude.
        cos_sin: [max_position, rotary_dim], float32, cosines then sines; None: no rotation.
        interleaved: True rotates pairs (2i, 2i + 1) (GPT-J), False halves (NeoX).
        key_stats: [num_pages, num_kv_heads, 2, head_dim], float32: per-page minimum and maximum of the rotated keys,
            updated in place; a write at offset 0 starts a page's afresh.
        key_rounding: int4 caches only: keys are rounded with feedback. None: every element to the nearest.
    Returns:
        None.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed; on the CPU slots and positions are checked too.
    Source: RoFormer (2104.09864); KV4, QServe (2405.04532); key statistics, LServe (2502.14866).
    """
    torch.ops.tilestream.append_kv(
        q,
        k,
        v,
        cos_sin,
        positions,
        slot_mapping,
        kv_cache.k_cache,
        kv_cache.v_cache,
        kv_cache.kv_scales,
        key_stats,
        *(() if key_rounding is None else (key_rounding.offset, key_rounding.order, key_rounding.feedback)),
        interleaved=interleaved,
        k_scale=kv_cache.k_scale,
        v_scale=kv_cache.v_scale,
        blocked=kv_cache.blocked,
        int4=kv_cache.int4,
    )


def gather_kv(kv_cache: KvCache, slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read tokens back from a cache of any layout and dtype.

    Args:
        kv_cache: the pages.
        slot_mapping: [num_tokens], int32, page * page_size + offset.
    Returns:
        k: [num_tokens, num_kv_heads, head_dim], float32.   v: [num_tokens, num_kv_heads, head_dim_vo], float32.
    Raises:
        ValueError, TypeError: which argument, what it was, what is allowed.
    """
    num_tokens, num_kv_heads = slot_mapping.size(0), kv_cache.k_cache.size(1)
    head_dim = kv_cache.k_cache.size(3) * (2 if kv_cache.int4 else 1)
    device = slot_mapping.device
    k = torch.empty(num_tokens, num_kv_heads, head_dim, device=device)
    v = torch.empty(num_tokens, num_kv_heads, kv_cache.head_dim_vo, device=device)
    torch.ops.tilestream.gather_kv(
        kv_cache.k_cache,
        kv_cache.v_cache,
        kv_cache.kv_scales,
        slot_mapping,
        k,
        v,
        k_scale=kv_cache.k_scale,
        v_scale=kv_cache.v_scale,
        blocked=kv_cache.blocked,
        int4=kv_cache.int4,
    )
    return k, v
