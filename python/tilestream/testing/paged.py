"""Paged KV caches for tests and benches: NaN wherever no request owns the memory, pages in shuffled order."""

from __future__ import annotations

import dataclasses
import math

import torch

from tilestream.ops import KvCache

FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_FLOAT_DTYPES = FLOAT_DTYPES | {"fp8": torch.float8_e4m3fn}
KV_BITS = {"int8": 8, "int4": 4}
UNUSED_PAGE = 1 << 30  # block_table entry that must never be followed


@dataclasses.dataclass(frozen=True)
class PagedKv:
    """A filled cache, and what it holds.

    cache: as the ops take it.   block_table: [num_lists, max_pages], int32; entries past a list's length are garbage.
    k, v: float64 [num_pages, num_kv_heads, page_size, head_dim]: the values that the cache represents.
    """

    cache: KvCache
    block_table: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


# Neighbours of the reduced axis (head_dim for K, tokens for V) that share a 32-bit lane of a blocked page.
_LANE_VALUES = {"float32": 1, "float16": 1, "bfloat16": 2, "fp8": 4, "int8": 4, "int4": 4}


def blocked_pages(values: torch.Tensor, kv_dtype: str, *, side: int) -> torch.Tensor:
    """Pages in the CPU backend's blocked order (csrc/include/tilestream/types.h).

    Args:
        values: [num_pages, num_kv_heads, page_size, head_dim], stored values (int4: 0..15, one per element).
        kv_dtype: float32, float16, bfloat16, fp8, int8 or int4.
        side: 0 for keys, 1 for values.
    Returns:
        [num_pages, num_kv_heads, page_size, head_dim] (int4: head_dim / 2 bytes), contiguous; the elements of each block
        of 16 tokens are in another order.
    """
    num_pages, num_heads, page_size, head_dim = values.shape
    blocks = values.view(num_pages, num_heads, page_size // 16, 16, head_dim)
    reduced_first = blocks.transpose(3, 4) if side == 0 else blocks  # [..., reduced, columns]
    lanes = reduced_first.unflatten(3, (-1, _LANE_VALUES[kv_dtype])).transpose(4, 5)  # [..., lanes, columns, in lane]
    if kv_dtype == "int4":
        lanes = lanes[..., ::2, :, :] | lanes[..., 1::2, :, :] << 4
    return lanes.contiguous().view(num_pages, num_heads, page_size, -1)


def quantise(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric quantisation of the last dim, to fill caches with.

    Returns:
        q: uint8, one value per element.   scales: float16 [..., 2]: scale, zero.
    """
    low, high = values.amin(-1), values.amax(-1)
    scales = torch.stack([(high - low) / (2**bits - 1), low], -1).half()
    scale, zero = scales.double().unbind(-1)
    q = ((values - zero.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return q.to(torch.uint8), scales


def dequantise(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantise`, float64."""
    scale, zero = scales.double().unbind(-1)
    return q.double() * scale.unsqueeze(-1) + zero.unsqueeze(-1)


def stored_pages(values: torch.Tensor, kv_dtype: str, layout: str, *, side: int) -> torch.Tensor:
    """Stored values as a cache of that layout (hnd, nhd or blocked) keeps them."""
    if layout == "blocked":
        return blocked_pages(values, kv_dtype, side=side)
    if kv_dtype == "int4":
        values = values[..., ::2] | values[..., 1::2] << 4  # low nibble = even element
    if layout == "hnd":
        return values
    if layout == "nhd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    raise ValueError(f"layout is {layout!r}; allowed: hnd, nhd, blocked")


def paged_kv(
    list_lens: list[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    kv_dtype: str,
    head_dim_vo: int | None = None,
    layout: str = "hnd",
    shared_prefix: tuple[int, list[int]] | None = None,
    spare_pages: int = 3,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> PagedKv:
    """A cache with one page list per entry of `list_lens`, filled with random values.

    Args:
        list_lens: tokens of each list.
        kv_dtype: float32, float16, bfloat16, fp8, int8 or int4.
        head_dim_vo: of the values; default head_dim.
        layout: hnd, nhd or blocked.
        shared_prefix: (tokens, lists): these lists have the same first pages.
        spare_pages: pages that nobody owns, all NaN.
        k_scale, v_scale: of an fp8 cache; what is stored is as large whatever they are.
    """
    counts = [-(-length // page_size) for length in list_lens]
    num_pages = sum(counts) + spare_pages
    order = torch.randperm(num_pages).tolist()
    table = torch.full((max(1, len(list_lens)), max([1, *counts]) + 1), UNUSED_PAGE, dtype=torch.int32)
    owned = torch.zeros(num_pages, 1, page_size, 1, dtype=torch.bool)
    for row, count in enumerate(counts):
        pages = [order.pop() for _ in range(count)]
        if shared_prefix is not None and row in shared_prefix[1]:
            first = table[shared_prefix[1][0]].tolist()
            whole = shared_prefix[0] // page_size
            pages[:whole] = pages[:whole] if row == shared_prefix[1][0] else first[:whole]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        for index, page in enumerate(pages):
            owned[page, 0, : min(page_size, list_lens[row] - index * page_size)] = True
    shape = (num_pages, num_kv_heads, page_size)
    sides = [torch.randn(*shape, dim, dtype=torch.float64) for dim in (head_dim, head_dim_vo or head_dim)]
    stored, values, scales = [], [], []
    for side, random in enumerate(sides):
        if kv_dtype in KV_FLOAT_DTYPES:
            pages = torch.where(owned, random, math.nan).to(KV_FLOAT_DTYPES[kv_dtype])
            values.append(pages.double() * (k_scale, v_scale)[side])
        else:
            pages, scale = quantise(random, KV_BITS[kv_dtype])
            scale = torch.where(owned, scale, math.nan)
            scales.append(scale)
            values.append(dequantise(pages, scale))
        stored.append(stored_pages(pages, kv_dtype, layout, side=side))
    kv_scales = torch.stack(scales, 1) if scales else None
    cache = KvCache(stored[0], stored[1], kv_scales, layout == "blocked", kv_dtype == "int4", k_scale, v_scale)
    return PagedKv(cache, table, values[0], values[1])
