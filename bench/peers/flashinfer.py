"""FlashInfer (0.6) over the same pages as ours, where it is installed.

It compiles its kernels for each dtype and head_dim when they are first wanted, which takes longer than all benches.
`FLASHINFER_CUDA_ARCH_LIST=9.0a python -m bench.peers.flashinfer` compiles those that the benches take and keeps them in the
package; it needs nvcc and no GPU. A peer here is planned when it is first called, so that what it cannot do shows there.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilestream.ops import KvCache

# Of caches[i]: the rows of all tokens, in one tensor or several.
Run = Callable[[int], "torch.Tensor | tuple[torch.Tensor, ...]"]

_WORKSPACE_BYTES, _XQA_WORKSPACE_BYTES = 256 << 20, 128 << 20
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PagedBatch:
    """A step: request b has the last q_lens[b] of kv_lens[b] tokens.

    q: [num_tokens, num_qo_heads, head_dim].   block_table: [batch_size, max_pages], int32; past a request's pages: any page.
    """

    q: torch.Tensor
    caches: list[KvCache]
    block_table: torch.Tensor
    q_lens: list[int]
    kv_lens: list[int]

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.caches[0].k_cache.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """num_qo_heads, num_kv_heads, head_dim, page_size"""
        num_kv_heads, page_size, head_dim = self.caches[0].k_cache.shape[1:]
        return self.q.size(1), num_kv_heads, head_dim, page_size

    def pages(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.caches[i].k_cache, self.caches[i].v_cache

    def int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def starts(self, lengths: list[int]) -> torch.Tensor:
        return torch.cat([self.int32([0]), self.int32(lengths).cumsum(0, dtype=torch.int32)])

    def table(self, begin: int = 0, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the tokens from begin, which begins a page, to end: where each request's pages begin, the pages, and how many
        tokens its last one has."""
        page_size = self.shape[3]
        lengths = [(kv_len if end is None else end) - begin for kv_len in self.kv_lens]
        counts = [-(-length // page_size) for length in lengths]
        first = begin // page_size
        indices = torch.cat([row[first : first + count] for row, count in zip(self.block_table, counts)])
        return self.starts(counts), indices, self.int32([(length - 1) % page_size + 1 for length in lengths])


def _workspace(batch: PagedBatch) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.q.device)


def _when_called(plan: Callable[[], Run]) -> Run:
    planned = functools.cache(plan)
    return lambda i: planned()(i)


def _installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def prefill(batch: PagedBatch, keys_and_values: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, Run]:
    """{name: causal prefill}, bfloat16 products. keys_and_values: the same [token, kv head, dim] one after the other, without
    pages: the form that its kernels for Hopper load by TMA."""
    if not _installed():
        return {}
    backends = ("fa2", "fa3") if batch.cache_dtype == batch.q.dtype else ("fa2",)
    peers = {f"FlashInfer {backend}": _when_called(functools.partial(_paged_prefill, batch, backend)) for backend in backends}
    if keys_and_values is not None:
        peers["FlashInfer fa3, no pages"] = _when_called(functools.partial(_ragged_prefill, batch, *keys_and_values))
    return peers


def _paged_prefill(batch: PagedBatch, backend: str) -> Run:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(batch), "HND", backend=backend)
    wrapper.plan(
        batch.starts(batch.q_lens), *batch.table(), *batch.shape, causal=True, q_data_type=batch.q.dtype,
        kv_data_type=batch.cache_dtype,
    )  # fmt: skip
    out = torch.empty_like(batch.q)
    return lambda i: wrapper.run(batch.q, batch.pages(i), out=out)


def _ragged_prefill(batch: PagedBatch, k: torch.Tensor, v: torch.Tensor) -> Run:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(batch), "NHD", backend="fa3")
    wrapper.plan(
        batch.starts(batch.q_lens), batch.starts(batch.kv_lens), *batch.shape[:3], causal=True, q_data_type=batch.q.dtype,
        kv_data_type=k.dtype,
    )  # fmt: skip
    out = torch.empty_like(batch.q)
    return lambda i: wrapper.run(batch.q, k, v, out=out)


def fp8_prefill(batch: PagedBatch) -> dict[str, Run]:
    """{name: causal prefill with products in e4m3} over an fp8 cache; q is rounded beforehand."""
    return {"FlashInfer fa3, fp8 products": _when_called(functools.partial(_fp8_prefill, batch))} if _installed() else {}


def _fp8_prefill(batch: PagedBatch) -> Run:
    import flashinfer

    num_qo_heads, num_kv_heads = batch.shape[:2]
    q, out = batch.q.to(E4M3), torch.empty_like(batch.q)
    scales = [torch.ones(n, dtype=torch.float32, device=q.device) for n in (num_qo_heads, num_kv_heads, num_kv_heads)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(batch), "HND", backend="fa3")
    wrapper.plan(
        batch.starts(batch.q_lens), *batch.table(), *batch.shape, causal=True, q_data_type=E4M3, kv_data_type=E4M3,
        o_data_type=out.dtype,
    )  # fmt: skip
    return lambda i: wrapper.run(q, batch.pages(i), *scales, out=out)


def decode(batch: PagedBatch) -> dict[str, Run]:
    """{name: decode}; XQA's products over an fp8 cache are in fp8."""
    if not _installed():
        return {}
    return {name: _when_called(functools.partial(plan, batch)) for name, plan in (("FlashInfer", _decode), ("XQA", _xqa))}


def _decode(batch: PagedBatch) -> Run:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(batch), "HND", use_tensor_cores=True)
    wrapper.plan(*batch.table(), *batch.shape, q_data_type=batch.q.dtype, kv_data_type=batch.cache_dtype)
    out = torch.empty_like(batch.q)
    return lambda i: wrapper.run(batch.q, batch.pages(i), out=out)


def _xqa(batch: PagedBatch) -> Run:
    import flashinfer

    workspace = torch.zeros(_XQA_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.q.device)  # it counts in it, from 0
    lengths, out = batch.int32(batch.kv_lens), torch.empty_like(batch.q)
    options = {"bmm1_scale": batch.q.size(2) ** -0.5, "bmm2_scale": 1.0, "kv_layout": "HND", "backend": "xqa", "out": out}
    return lambda i: flashinfer.decode.trtllm_batch_decode_with_kv_cache(
        batch.q, batch.pages(i), workspace, batch.block_table, lengths, max(batch.kv_lens), **options
    )


def mixed(batch: PagedBatch) -> dict[str, Run]:
    """{name: one launch} for a chunk, the first request, and decodes."""
    if not _installed():
        return {}
    plans = (("FlashInfer BatchAttention", _batch_attention), ("FlashInfer POD", _pod))
    return {name: _when_called(functools.partial(plan, batch)) for name, plan in plans}


def _batch_attention(batch: PagedBatch) -> Run:
    import flashinfer

    num_qo_heads, num_kv_heads, head_dim, page_size = batch.shape
    starts, pages, _ = batch.table()
    wrapper = flashinfer.BatchAttention(kv_layout="HND", device=str(batch.q.device))
    wrapper.plan(
        batch.starts(batch.q_lens), starts, pages, batch.int32(batch.kv_lens), num_qo_heads, num_kv_heads, head_dim, head_dim,
        page_size, causal=True, q_data_type=batch.q.dtype, kv_data_type=batch.cache_dtype,
    )  # fmt: skip
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2], device=batch.q.device)
    return lambda i: wrapper.run(batch.q, batch.pages(i), out=out, lse=lse)[0]


def _pod(batch: PagedBatch) -> Run:
    import flashinfer

    chunk = batch.q_lens[0]
    starts, pages, last_lens = batch.table()
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(_workspace(batch), "HND")
    wrapper.plan(
        batch.int32([0, chunk]), starts[:2], pages[: starts[1]], last_lens[:1],
        batch.starts(batch.q_lens[1:]), starts[1:] - starts[1], pages[starts[1] :], last_lens[1:],
        *batch.shape, q_data_type=batch.q.dtype, kv_data_type=batch.cache_dtype,
    )  # fmt: skip
    return lambda i: wrapper.run(batch.q[:chunk], batch.pages(i), batch.q[chunk:], batch.pages(i), causal_p=True)


def cascade(batch: PagedBatch, prefix: int) -> dict[str, Run]:
    """{name: decode} of requests that all begin with the same `prefix` tokens, in the same full pages."""
    return {"FlashInfer cascade": _when_called(functools.partial(_cascade, batch, prefix))} if _installed() else {}


def _cascade(batch: PagedBatch, prefix: int) -> Run:
    import flashinfer

    first = PagedBatch(batch.q, batch.caches, batch.block_table[:1], batch.q_lens[:1], batch.kv_lens[:1])
    levels = zip(first.table(0, prefix), batch.table(prefix))
    starts, pages, last_lens = ([shared, own] for shared, own in levels)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(batch), "HND")
    wrapper.plan(
        [batch.int32([0, len(batch.q_lens)]), batch.starts(batch.q_lens)], starts, pages, last_lens, *batch.shape,
        q_data_type=batch.q.dtype, kv_data_type=batch.cache_dtype,
    )  # fmt: skip
    return lambda i: wrapper.run(batch.q, batch.pages(i))


def compile_kernels() -> None:
    """Those that the benches take, into the package."""
    from flashinfer.jit import attention, cascade as jit_cascade, core, xqa

    bf16, plain = torch.bfloat16, (0, False, False)  # positions as they are, no window, no soft cap
    prefills = [("fa2", bf16, bf16, dim) for dim in (64, 128, 256)] + [("fa3", bf16, bf16, dim) for dim in (64, 128, 256)]
    prefills += [("fa2", bf16, E4M3, 128), ("fa3", E4M3, E4M3, 128)]
    specs = [
        attention.gen_batch_prefill_module(backend, q, kv, bf16, torch.int32, dim, dim, *plain, False)
        for backend, q, kv, dim in prefills
    ]
    specs.append(attention.gen_batch_attention_module(bf16, bf16, bf16, torch.int32, 128, 128, 0, False, False))
    specs.append(attention.gen_batch_pod_module(bf16, bf16, bf16, 128, *plain, False, torch.int32, *plain))
    specs.append(jit_cascade.gen_cascade_module())
    specs += [xqa.gen_xqa_module(bf16, kv, 64, 128, group, False, bf16) for kv in (bf16, E4M3) for group in (4, 8)]
    core.build_jit_specs(specs, verbose=True)
    for spec in specs:
        spec.aot_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.jit_library_path, spec.aot_path)


if __name__ == "__main__":
    compile_kernels()
