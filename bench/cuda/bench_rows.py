"""Ops that go through rows once, on a GPU: norms, activations, quantisation, embedding, the KV cache's writes and reads

Shapes are Llama 3 8B's. The limit is a large copy; beside torch's own operations stands torch's copy of as many bytes as the
op reads and writes. That is the fairer one for few tokens, whose buffers are found in L2 however many sets of them there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from bench.cuda.timing import DEVICE, check, interleave, num_sets, working
from bench.harness import Report
from bench.roofs import Work
from tilestream import ops
from tilestream.ops import KvCache, PackedFormat, PackedWeight, QuantisedRows

HIDDEN, INTERMEDIATE, VOCAB_SIZE = 4096, 14336, 128_256
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
EPS = 1e-5


@dataclass
class Case:
    """An op on one set of buffers. Ours and torch's give the same values, each from buffers of its own where it works in place.

    num_bytes: read and written.
    """

    ours: Callable[[], torch.Tensor | QuantisedRows]
    torch: Callable[[], torch.Tensor | QuantisedRows]
    num_bytes: int
    bound: float = 0.01


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def rows_bytes(rows: QuantisedRows) -> int:
    return rows.q.nbytes + rows.scale.nbytes + rows.sum.nbytes


def values(result: torch.Tensor | QuantisedRows) -> torch.Tensor:
    return result.q * result.scale.repeat_interleave(128, 1) if isinstance(result, QuantisedRows) else result


def quantise_with_torch(x: torch.Tensor) -> QuantisedRows:
    groups = x.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scale).round().to(torch.int8).flatten(1)
    return QuantisedRows(q, scale.squeeze(-1), q.unflatten(1, (-1, 32)).sum(-1, dtype=torch.int32))


def norm_weight() -> torch.Tensor:
    return torch.rand(HIDDEN, device=DEVICE)


def rms_norm_case(num_tokens: int) -> Case:
    x, weight = randn(num_tokens, HIDDEN), norm_weight()
    out, cast = torch.empty_like(x), weight.bfloat16()
    return Case(
        lambda: ops.rms_norm(x, weight, eps=EPS, out=out), lambda: rms_norm(x, (HIDDEN,), cast, EPS), 2 * x.nbytes
    )


def fused_add_rms_norm_case(num_tokens: int) -> Case:
    x, residual, weight = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN), norm_weight()
    x_torch, residual_torch, cast = x.clone(), residual.clone(), weight.bfloat16()

    def ours() -> torch.Tensor:
        ops.fused_add_rms_norm(x, residual, weight, eps=EPS)
        return x

    def with_torch() -> torch.Tensor:
        return rms_norm(residual_torch.add_(x_torch), (HIDDEN,), cast, EPS)

    return Case(ours, with_torch, 4 * x.nbytes)


def fused_add_rms_norm_quant_case(num_tokens: int) -> Case:
    x, residual, weight = randn(num_tokens, HIDDEN), randn(num_tokens, HIDDEN), norm_weight()
    residual_torch, cast = residual.clone(), weight.bfloat16()
    out = QuantisedRows.empty(num_tokens, HIDDEN, device=DEVICE)
    return Case(
        lambda: ops.fused_add_rms_norm_quant(x, residual, weight, eps=EPS, out=out),
        lambda: quantise_with_torch(rms_norm(residual_torch.add_(x), (HIDDEN,), cast, EPS)),
        3 * x.nbytes + rows_bytes(out), 0.02,
    )  # fmt: skip


def silu_and_mul_case(num_tokens: int) -> Case:
    x, out = randn(num_tokens, 2 * INTERMEDIATE), randn(num_tokens, INTERMEDIATE)
    gate, up = x.chunk(2, 1)
    return Case(lambda: ops.silu_and_mul(x, out=out), lambda: silu(gate) * up, x.nbytes + out.nbytes)


def silu_and_mul_quant_case(num_tokens: int) -> Case:
    x, out = randn(num_tokens, 2 * INTERMEDIATE), QuantisedRows.empty(num_tokens, INTERMEDIATE, device=DEVICE)
    gate, up = x.chunk(2, 1)
    return Case(
        lambda: ops.silu_and_mul_quant(x, out=out), lambda: quantise_with_torch(silu(gate) * up),
        x.nbytes + rows_bytes(out), 0.03,
    )  # fmt: skip


def quantise_case(num_tokens: int) -> Case:
    x, out = randn(num_tokens, HIDDEN), QuantisedRows.empty(num_tokens, HIDDEN, device=DEVICE)
    return Case(lambda: ops.quantise(x, out=out), lambda: quantise_with_torch(x), x.nbytes + rows_bytes(out), 0.02)


def embedding_case(num_tokens: int) -> Case:
    table, ids = embedding_table(), torch.randint(0, VOCAB_SIZE, (num_tokens,), device=DEVICE)
    return Case(
        lambda: ops.embedding(ids, table, dtype=torch.bfloat16),
        lambda: torch.nn.functional.embedding(ids, table.matrix), 4 * num_tokens * HIDDEN,
    )  # fmt: skip


@functools.cache
def embedding_table() -> PackedWeight:
    """A gigabyte, so one for all cases."""
    data = randn(VOCAB_SIZE, HIDDEN).view(torch.uint8).flatten()
    return PackedWeight(data, VOCAB_SIZE, HIDDEN, PackedFormat.ROWS_BFLOAT16)


def slots_and_cache(num_tokens: int, kv_dtype: str) -> tuple[torch.Tensor, KvCache]:
    num_pages = -(-num_tokens // PAGE_SIZE)
    tokens = torch.arange(num_tokens, device=DEVICE)
    slots = torch.randperm(num_pages, device=DEVICE)[tokens // PAGE_SIZE] * PAGE_SIZE + tokens % PAGE_SIZE
    cache = KvCache.allocate(num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, kv_dtype=kv_dtype, blocked=False, device=DEVICE)
    return slots.int(), cache


def append_kv_case(num_tokens: int) -> Case:
    """RoPE of q and k, and the write into a bfloat16 cache; torch writes rows of [slot, head, dim]. Checked: the rotated q."""
    heads = [NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    qkv = randn(num_tokens, sum(heads), HEAD_DIM)
    (q, k, v), (q_torch, _, _) = qkv.split(heads, 1), qkv.clone().split(heads, 1)
    angles = torch.rand(num_tokens, HEAD_DIM // 2, device=DEVICE) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
    slots, cache = slots_and_cache(num_tokens, "bfloat16")
    k_rows, v_rows = (x.flatten(0, 1) for x in randn(2, cache.num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM))
    rows, index = slots.long(), positions.long()

    def ours() -> torch.Tensor:
        ops.append_kv(q, k, v, positions, slots, cache, cos_sin=cos_sin)
        return q

    def with_torch() -> torch.Tensor:
        cos, sin = cos_sin[index].unsqueeze(1).chunk(2, 2)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16()

        k_rows.index_copy_(0, rows, rotated(k))
        v_rows.index_copy_(0, rows, v)
        return rotated(q_torch)

    return Case(ours, with_torch, 2 * qkv.nbytes + cos_sin.nbytes)


def gather_kv_case(num_tokens: int) -> Case:
    """From a bfloat16 cache to float32; torch takes rows of [slot, head, dim]. Checked: the keys."""
    slots, cache = slots_and_cache(num_tokens, "bfloat16")
    k_rows, v_rows = (x.flatten(0, 1) for x in randn(2, cache.num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM))
    for pages, of_rows in ((cache.k_cache, k_rows), (cache.v_cache, v_rows)):
        pages.copy_(of_rows.unflatten(0, (-1, PAGE_SIZE)).transpose(1, 2))
    rows = slots.long()
    return Case(
        lambda: ops.gather_kv(cache, slots)[0], lambda: (v_rows[rows].float(), k_rows[rows].float())[1],
        2 * num_tokens * NUM_KV_HEADS * HEAD_DIM * (2 + 4),
    )  # fmt: skip


CASES = {
    "rms_norm": rms_norm_case,
    "fused_add_rms_norm": fused_add_rms_norm_case,
    "fused_add_rms_norm_quant": fused_add_rms_norm_quant_case,
    "silu_and_mul": silu_and_mul_case,
    "silu_and_mul_quant": silu_and_mul_quant_case,
    "quantise": quantise_case,
    "embedding": embedding_case,
    "append_kv": append_kv_case,
    "gather_kv": gather_kv_case,
}


@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
@pytest.mark.parametrize("op", CASES)
def test_rows(op: str, num_tokens: int, report: Report) -> None:
    first = CASES[op](num_tokens)
    check(values(first.ours()), values(first.torch()), first.bound)
    sets = num_sets(first.num_bytes)
    cases = [first] + [CASES[op](num_tokens) for _ in range(sets - 1)]
    copies = [torch.randint(0, 256, (2, first.num_bytes // 2), dtype=torch.uint8, device=DEVICE) for _ in range(sets)]
    peers = {"torch": lambda i: cases[i].torch(), "copy": lambda i: copies[i][0].copy_(copies[i][1])}
    times = interleave({"ours": lambda i: cases[i].ours()} | working(peers), sets)
    report.add(op, f"{num_tokens} tokens", times, work=Work(first.num_bytes, memory="copy"))
