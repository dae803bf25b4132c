"""The paged KV cache of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilestream.ops.memory import empty_huge

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.uint8,
    "int4": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class KvCache:
    """Paged keys and values of one layer, as the attention and append ops take them.

    Args:
        k_cache, v_cache: [num_pages, num_kv_heads, page_size, head_dim], any page, head and token strides (HND, NHD and
            vLLM's views work as they are); fp8: float8_e4m3fn; int8: uint8; int4: uint8 with head_dim / 2 (low nibble =
            even element).
        kv_scales: [num_pages, 2, num_kv_heads, page_size, 2], float16, (scale, zero) per token and head for K and V;
            value = q * scale + zero. int8 and int4 only.
        blocked: pages are in the CPU backend's own order (csrc/include/tilestream/types.h), written by `append_kv`
            and read back by `gather_kv`.
        int4: two 4-bit values per byte.
        k_scale, v_scale: fp8 only: value = stored * scale, one scale for all keys and one for all values of the layer, as
            calibrated checkpoints give them. `append_kv` divides by them; beyond 448 * scale it saturates.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_scales: torch.Tensor | None = None
    blocked: bool = False
    int4: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0

    @staticmethod
    def allocate(
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        kv_dtype: str = "bfloat16",
        blocked: bool = True,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> KvCache:
        """A cache of `num_pages` pages of `page_size` tokens. Its memory is not touched before it is written.

        Args:
            num_pages, num_kv_heads, page_size, head_dim: sizes; page_size 16, 32 or 64 tokens.
            kv_dtype: float32, float16, bfloat16, fp8 (e4m3), int8 or int4.
            blocked: use the CPU backend's blocked page order.
            k_scale, v_scale: of an fp8 cache.
            device: where the pages live.
        Returns:
            The cache; k_cache and v_cache are views of one [num_pages, 2, num_kv_heads, page_size, head_dim] tensor.
        Raises:
            ValueError: kv_dtype or page_size is not one of those supported.
        """
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype is {kv_dtype!r}; supported: {', '.join(KV_DTYPES)}")
        if page_size not in (16, 32, 64):
            raise ValueError(f"page_size is {page_size}; supported: 16, 32, 64")
        width = head_dim // 2 if kv_dtype == "int4" else head_dim
        shape, dtype = (num_pages, 2, num_kv_heads, page_size, width), KV_DTYPES[kv_dtype]
        if torch.device(device).type == "cpu":
            pages = empty_huge(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        else:
            pages = torch.empty(shape, dtype=dtype, device=device)
        scales = None
        if kv_dtype in ("int8", "int4"):
            scales = torch.empty(num_pages, 2, num_kv_heads, page_size, 2, dtype=torch.float16, device=device)
        return KvCache(pages[:, 0], pages[:, 1], scales, blocked, kv_dtype == "int4", k_scale, v_scale)

    @property
    def num_pages(self) -> int:
        return self.k_cache.size(0)

    @property
    def page_size(self) -> int:
        return self.k_cache.size(2)

    @property
    def head_dim_vo(self) -> int:
        return self.v_cache.size(3) * (2 if self.int4 else 1)
