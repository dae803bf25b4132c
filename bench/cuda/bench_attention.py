"""Paged attention on a GPU against torch SDPA (flash, cuDNN) and, where it is installed, FlashInfer

Decode rates count K and V once, as they are stored; prefill rates count the causal half, 2 * heads * tokens^2 * head_dim
operations. Ours and FlashInfer read the same shuffled pages, SDPA reads contiguous K and V in bfloat16, whatever the cache is.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda.timing import DEVICE, Run, check, interleave, num_sets, working
from bench.harness import Report
from bench.peers.flashinfer import paged_decode
from bench.roofs import Work
from tilestream import ops
from tilestream.ops import AttentionPlanner, KvCache

PAGE_SIZE = 64
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
# Bytes of a stored row, and how far from the attention over unquantised keys and values a result may be.
ROW_BYTES = {"bfloat16": lambda d: 2 * d, "fp8": lambda d: d, "int8": lambda d: d + 4, "int4": lambda d: d // 2 + 4}
BOUNDS = {"bfloat16": 0.01, "fp8": 0.08, "int8": 0.02, "int4": 0.35}
APPENDED_TOKENS = 1 << 18  # at a time

GQA_8 = (32, 4, 128)  # num_qo_heads, num_kv_heads, head_dim
DECODES = [(b, kv) for b in (1, 8, 32, 128) for kv in (1 << 10, 1 << 13, 1 << 15, 1 << 17) if b * kv <= 1 << 22]
FEW_DECODES = [(1, 1 << 15), (8, 1 << 13), (32, 1 << 13), (128, 1 << 13)]
DECODE_CASES = (
    [(*shape, GQA_8, "bfloat16") for shape in DECODES]
    + [(*shape, (64, 8, 128), "bfloat16") for shape in FEW_DECODES]
    + [(*shape, GQA_8, kv_dtype) for kv_dtype in ("fp8", "int8", "int4") for shape in FEW_DECODES]
)
PREFILLS = [(1, 512), (1, 4096), (1, 16384), (8, 1024)]
CHUNK, NUM_DECODES, MIXED_KV_LEN = 512, 64, 8192


class Pages:
    """Random keys and values of equally long requests: contiguous, [set, request, token, head, dim], and in shuffled pages."""

    def __init__(self, sets: int, batch_size: int, kv_len: int, num_kv_heads: int, head_dim: int, kv_dtype: str) -> None:
        self.kv_dtype = kv_dtype
        shape = (sets, batch_size, kv_len, num_kv_heads, head_dim)
        self.k, self.v = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        pages_each = math.ceil(kv_len / PAGE_SIZE)
        num_pages = batch_size * pages_each
        self.block_table = torch.randperm(num_pages, device=DEVICE).int().view(batch_size, pages_each)
        tokens = torch.arange(kv_len, device=DEVICE, dtype=torch.int32)
        slots = (self.block_table[:, tokens // PAGE_SIZE] * PAGE_SIZE + tokens % PAGE_SIZE).flatten()
        self.caches = []
        for k, v in zip(self.k.flatten(1, 2), self.v.flatten(1, 2)):
            cache = KvCache.allocate(
                num_pages, num_kv_heads, PAGE_SIZE, head_dim, kv_dtype=kv_dtype, blocked=False, device=DEVICE
            )
            for begin in range(0, len(slots), APPENDED_TOKENS):
                rows = slice(begin, begin + APPENDED_TOKENS)
                ops.append_kv(None, k[rows], v[rows], torch.zeros_like(slots[rows]), slots[rows], cache)
            self.caches.append(cache)

    def heads_first(self, i: int, requests: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A set's keys and values as SDPA takes them: views [request, head, token, dim]."""
        return self.k[i, requests].transpose(1, 2), self.v[i, requests].transpose(1, 2)


class Batch:
    """A step over pages: request b of them, counted from `first`, has q_lens[b] query tokens, its last ones."""

    def __init__(self, pages: Pages, q_lens: list[int], num_qo_heads: int, *, first: int = 0) -> None:
        kv_len, num_kv_heads, head_dim = pages.k.shape[2:]
        self.pages, self.q_lens, self.kv_len = pages, q_lens, kv_len
        self.requests = slice(first, first + len(q_lens))
        self.starts = torch.tensor([0, *q_lens]).cumsum(0).int()
        self.q = torch.randn(sum(q_lens), num_qo_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
        self.out = torch.full_like(self.q, math.nan)
        self.planner = AttentionPlanner(
            num_qo_heads, num_kv_heads, head_dim, page_size=PAGE_SIZE, device=DEVICE, kv_dtype=pages.kv_dtype
        )
        kv_lens = torch.full((len(q_lens),), kv_len, dtype=torch.int32)
        self.planner.reserve(self.starts, kv_lens)
        self.plan = self.planner.plan(self.starts, kv_lens)

    def ours(self, i: int) -> torch.Tensor:
        table = self.pages.block_table[self.requests]
        return ops.attention(self.q, self.pages.caches[i], table, self.plan, out=self.out)

    def queries(self, b: int) -> torch.Tensor:
        """Of all requests from b on, which have equally many: [request, head, token, dim]."""
        return self.q[int(self.starts[b]) :].unflatten(0, (-1, self.q_lens[b])).transpose(1, 2)

    def check(self) -> None:
        """A few rows of the first and the last request, against float32 on the keys and values before they were stored."""
        self.ours(0)
        got, expected = [], []
        for b in {0, len(self.q_lens) - 1}:
            k, v = (x[0, self.requests.start + b].float() for x in (self.pages.k, self.pages.v))  # [token, head, dim]
            for row in {0, self.q_lens[b] // 3, self.q_lens[b] - 1}:
                seen = self.kv_len - self.q_lens[b] + row + 1
                index = int(self.starts[b]) + row
                q = self.q[index].float().unflatten(0, (k.size(1), -1))  # [kv head, group, dim]
                weights = torch.einsum("hgd,thd->hgt", q, k[:seen]).mul_(q.size(-1) ** -0.5).softmax(-1)
                expected.append(torch.einsum("hgt,thd->hgd", weights, v[:seen]).flatten(0, 1))
                got.append(self.out[index])
        check(torch.stack(got), torch.stack(expected), BOUNDS[self.pages.kv_dtype])
        assert bool(self.out.isfinite().all())


def sdpa(backend: SDPBackend, batch: Batch) -> Run:
    q, causal = batch.queries(0), batch.q_lens[0] > 1

    def run(i: int) -> torch.Tensor:
        with sdpa_kernel(backend):
            k, v = batch.pages.heads_first(i, batch.requests)
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return run


@pytest.mark.parametrize(("batch_size", "kv_len", "heads", "kv_dtype"), DECODE_CASES, ids=str)
def test_decode(batch_size: int, kv_len: int, heads: tuple[int, int, int], kv_dtype: str, report: Report) -> None:
    num_qo_heads, num_kv_heads, head_dim = heads
    num_bytes = 2 * batch_size * kv_len * num_kv_heads * ROW_BYTES[kv_dtype](head_dim)
    sets = num_sets(num_bytes)
    batch = Batch(Pages(sets, batch_size, kv_len, num_kv_heads, head_dim, kv_dtype), [1] * batch_size, num_qo_heads)
    batch.check()
    peers = {f"SDPA {name}": sdpa(backend, batch) for name, backend in BACKENDS.items()}
    if kv_dtype == "bfloat16":
        peers |= paged_decode(batch.q, batch.pages.caches, batch.pages.block_table, kv_len)
    times = interleave({"ours": batch.ours} | working(peers), sets)
    num_ops = 4 * batch_size * num_qo_heads * kv_len * head_dim
    what = f"{batch_size} x {kv_len}, heads {heads}"
    report.add(f"decode, {kv_dtype} KV", what, times, work=Work(num_bytes, num_ops, "bf16", memory="copy"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("batch_size", "num_tokens"), PREFILLS, ids=str)
def test_causal_prefill(batch_size: int, num_tokens: int, head_dim: int, report: Report) -> None:
    heads = (32, 8, head_dim)
    batch = Batch(Pages(1, batch_size, num_tokens, *heads[1:], "bfloat16"), [num_tokens] * batch_size, heads[0])
    batch.check()
    peers = {f"SDPA {name}": sdpa(backend, batch) for name, backend in BACKENDS.items()}
    times = interleave({"ours": batch.ours} | working(peers), 1)
    num_ops = 2 * batch_size * heads[0] * num_tokens**2 * head_dim
    num_bytes = batch.pages.k.nbytes + batch.pages.v.nbytes + 2 * batch.q.nbytes
    what = f"{batch_size} x {num_tokens}, heads {heads}"
    report.add("causal prefill, bfloat16 KV", what, times, work=Work(num_bytes, num_ops, "bf16", memory="copy"))


def test_chunk_beside_decodes(report: Report) -> None:
    """One launch for both against two: the chunk alone, then the decodes alone."""
    num_qo_heads, num_kv_heads, head_dim = heads = (32, 8, 128)
    pages = Pages(1, 1 + NUM_DECODES, MIXED_KV_LEN, num_kv_heads, head_dim, "bfloat16")
    batch = Batch(pages, [CHUNK] + [1] * NUM_DECODES, num_qo_heads)
    batch.check()
    chunk, decodes = Batch(pages, [CHUNK], num_qo_heads), Batch(pages, [1] * NUM_DECODES, num_qo_heads, first=1)
    causal = causal_lower_right(CHUNK, MIXED_KV_LEN)

    def flash_chunk() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            k, v = pages.heads_first(0, chunk.requests)
            return scaled_dot_product_attention(chunk.queries(0), k, v, attn_mask=causal, enable_gqa=True)

    flash_decodes = sdpa(SDPBackend.FLASH_ATTENTION, decodes)
    peers = {
        "ours, two launches": lambda i: (chunk.ours(i), decodes.ours(i)),
        "SDPA flash twice": lambda i: (flash_chunk(), flash_decodes(i)),
    }
    flashinfer = paged_decode(decodes.q, pages.caches, pages.block_table[decodes.requests], MIXED_KV_LEN)
    for name, decode in flashinfer.items():
        peers[f"SDPA flash, then {name}"] = lambda i, decode=decode: (flash_chunk(), decode(i))
    peers = working(peers)
    if "SDPA flash twice" in peers:
        check(flash_chunk()[0].transpose(0, 1), chunk.ours(0), BOUNDS["bfloat16"])
    times = interleave({"ours": batch.ours} | peers, 1)
    seen = CHUNK * (MIXED_KV_LEN - CHUNK // 2) + NUM_DECODES * MIXED_KV_LEN
    what = f"{CHUNK} + {NUM_DECODES} x 1 over {MIXED_KV_LEN}, heads {heads}"
    work = Work(pages.k.nbytes + pages.v.nbytes, 4 * num_qo_heads * seen * head_dim, "bf16", memory="copy")
    report.add("chunk and decodes, bfloat16 KV", what, times, work=work)
