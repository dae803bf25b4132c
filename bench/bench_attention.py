"""Paged attention against torch SDPA (`enable_gqa`), batches of equal lengths

Decode rates count K and V once; prefill rates count 2 * heads * S^2 * head_dim FLOP (causal half). Torch gets contiguous
K and V, ours shuffled pages of 32 tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch

from bench.harness import Report, interleave
from bench.roofs import Work
from tilestream import ops
from tilestream.ops import AttentionPlanner, KvCache

PAGE_SIZE = 32
MODELS = [(9, 3, 64), (32, 8, 128)]  # num_qo_heads, num_kv_heads, head_dim
SLOW_SECONDS = 0.05  # peers slower than this get few rounds


class Case:
    """One batch: q, k, v in [batch_size, heads, tokens, head_dim], and the same keys and values in pages."""

    def __init__(self, batch_size: int, q_len: int, kv_len: int, model: tuple[int, int, int]) -> None:
        self.num_qo_heads, self.num_kv_heads, self.head_dim = model
        self.batch_size, self.q_len, self.kv_len = batch_size, q_len, kv_len
        self.q = torch.randn(batch_size, self.num_qo_heads, q_len, self.head_dim).bfloat16()
        self.k, self.v = torch.randn(2, batch_size, self.num_kv_heads, kv_len, self.head_dim).bfloat16()
        self.kv_bytes = self.k.nbytes + self.v.nbytes

    def ours(self, kv_dtype: str) -> Callable[[], torch.Tensor]:
        pages_each = math.ceil(self.kv_len / PAGE_SIZE)
        num_pages = self.batch_size * pages_each
        cache = KvCache.allocate(num_pages, self.num_kv_heads, PAGE_SIZE, self.head_dim, kv_dtype=kv_dtype)
        block_table = torch.randperm(num_pages, dtype=torch.int32).view(self.batch_size, pages_each)
        tokens = torch.arange(self.kv_len)
        for b in range(self.batch_size):
            slots = block_table[b, tokens // PAGE_SIZE] * PAGE_SIZE + (tokens % PAGE_SIZE).int()
            k, v = self.k[b].transpose(0, 1), self.v[b].transpose(0, 1)
            ops.append_kv(None, k, v, torch.zeros_like(slots), slots, cache)
        planner = AttentionPlanner(self.num_qo_heads, self.num_kv_heads, self.head_dim, page_size=PAGE_SIZE)
        cu_seqlens_q = torch.arange(self.batch_size + 1, dtype=torch.int32) * self.q_len
        plan = planner.plan(cu_seqlens_q, torch.full((self.batch_size,), self.kv_len, dtype=torch.int32))
        q = self.q.transpose(1, 2).reshape(-1, self.num_qo_heads, self.head_dim).contiguous()
        out = torch.empty_like(q)
        return lambda: (planner, ops.attention(q, cache, block_table, plan, out=out))[1]

    def sdpa(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        q, k, v = self.q.to(dtype), self.k.to(dtype), self.v.to(dtype)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.q_len > 1, enable_gqa=True)

    def candidates(self, kv_dtype: str) -> dict[str, Callable[[], torch.Tensor]]:
        ours = self.ours(kv_dtype)
        runs = {"ours": ours, "SDPA bf16": self.sdpa(torch.bfloat16), "SDPA fp32": self.sdpa(torch.float32)}
        expected = runs["SDPA fp32"]().transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(ours().float(), expected, rtol=2e-2, atol=2e-2)
        return runs


def rounds_for(runs: dict[str, Callable[[], torch.Tensor]]) -> int:
    slowest = max(statistics.median(t) for t in interleave(runs, rounds=1).values())
    return 3 if slowest > SLOW_SECONDS else 11


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize(("batch_size", "kv_len"), [(1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 8192)])
def test_decode(batch_size: int, kv_len: int, model: tuple[int, int, int], kv_dtype: str, report: Report) -> None:
    case = Case(batch_size, 1, kv_len, model)
    runs = case.candidates(kv_dtype)
    row_bytes = {"bfloat16": 2 * case.head_dim, "fp8": case.head_dim, "int8": case.head_dim + 4}[kv_dtype]
    num_bytes = case.kv_bytes * row_bytes / (2 * case.head_dim)
    num_ops = 4 * batch_size * case.num_qo_heads * kv_len * case.head_dim
    times = interleave(runs, rounds=rounds_for(runs))
    what = f"{batch_size} x {kv_len}, heads {model}"
    report.add(f"decode, {kv_dtype} KV", what, times, work=Work(int(num_bytes), num_ops, "bf16"))


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_causal_prefill(num_tokens: int, model: tuple[int, int, int], report: Report) -> None:
    case = Case(1, num_tokens, num_tokens, model)
    runs = case.candidates("bfloat16")
    times = interleave(runs, rounds=rounds_for(runs))
    num_ops = 2 * case.num_qo_heads * num_tokens**2 * case.head_dim
    num_bytes = case.kv_bytes + 2 * case.q.nbytes
    report.add("causal prefill, bfloat16 KV", f"{num_tokens}, heads {model}", times, work=Work(num_bytes, num_ops, "bf16"))
