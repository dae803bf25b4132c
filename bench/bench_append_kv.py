"""RoPE of q and k and the write of k and v into a paged cache, against the same in plain torch

The shape is SmolLM's: 9 query heads, 3 kv heads of 64. The limit is a copy of as many bytes as the op reads and writes, by
torch in the same run. The peer rotates q and k and writes rows of a [slot, head, dim] cache by index_copy_; for int8 it
quantises them first.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.harness import Report, interleave, seconds_text
from tilestream import ops

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 9, 3, 64, 32, 64
MAX_POSITION = NUM_PAGES * PAGE_SIZE


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 255
    return ((x.float() - low) / scale).round().to(torch.uint8), torch.cat([scale, low], -1).half()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 8, 512])
def test_append_kv(num_tokens: int, kv_dtype: str, dtype: torch.dtype, report: Report) -> None:
    heads = [NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    q, k, v = torch.randn(num_tokens, sum(heads), HEAD_DIM).to(dtype).split(heads, 1)
    angles = torch.rand(MAX_POSITION, HEAD_DIM // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    positions = torch.arange(num_tokens, dtype=torch.int32) + 5
    slots = torch.arange(num_tokens, dtype=torch.int32) + PAGE_SIZE
    cache = ops.KvCache.allocate(NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, kv_dtype=kv_dtype)
    stored = torch.bfloat16 if kv_dtype == "bfloat16" else torch.uint8
    k_plain = torch.zeros(MAX_POSITION, NUM_KV_HEADS, HEAD_DIM, dtype=stored)
    v_plain, scales = k_plain.clone(), torch.zeros(2, MAX_POSITION, NUM_KV_HEADS, 2, dtype=torch.float16)
    rows, index = slots.long(), positions.long()

    def with_torch() -> torch.Tensor:
        cos, sin = (angles_of[index].unsqueeze(1) for angles_of in cos_sin.chunk(2, 1))
        for side, x, plain in ((0, rotated(k, cos, sin), k_plain), (1, v, v_plain)):
            if stored == torch.uint8:
                x, scale_zero = quantised(x)
                scales[side].index_copy_(0, rows, scale_zero)
            plain.index_copy_(0, rows, x.to(stored))
        return rotated(q, cos, sin)

    want = with_torch()
    mine = q.clone()
    ops.append_kv(mine, k, v, positions, slots, cache, cos_sin=cos_sin)
    torch.testing.assert_close(mine.float(), want.float(), rtol=1e-2, atol=1e-2)
    for side, got in enumerate(ops.gather_kv(cache, slots)):
        plain = (k_plain, v_plain)[side][rows].float()
        if stored == torch.uint8:
            scale, low = scales[side][rows].float().unbind(-1)
            plain = plain * scale.unsqueeze(-1) + low.unsqueeze(-1)
        torch.testing.assert_close(got, plain, rtol=2e-2, atol=5e-2)  # int8: one step

    written = num_tokens * NUM_KV_HEADS * (2 * HEAD_DIM * stored.itemsize + (8 if stored == torch.uint8 else 0))
    num_bytes = 2 * q.nbytes + k.nbytes + v.nbytes + num_tokens * HEAD_DIM * 4 + written
    source = torch.ones(max(1, num_bytes // 8))
    target = torch.empty_like(source)
    times = interleave(
        {"ours": lambda: ops.append_kv(q, k, v, positions, slots, cache, cos_sin=cos_sin), "torch": with_torch,
         "copy": lambda: target.copy_(source)},
        rounds=25,
    )  # fmt: skip
    floor = statistics.median(times.pop("copy"))
    rate = num_bytes / statistics.median(times["ours"]) / 1e9
    report.add(
        "append_kv", f"{num_tokens} tokens, {dtype} to {kv_dtype}", times, rate=f"{rate:.1f} GB/s", limit=seconds_text(floor)
    )


@pytest.mark.parametrize("num_tokens", [1, 8, 512])
def test_key_rounding(num_tokens: int, report: Report) -> None:
    """Keys rounded with feedback, against every element to the nearest."""
    heads = [NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    q, k, v = torch.randn(num_tokens, sum(heads), HEAD_DIM).bfloat16().split(heads, 1)
    cache = ops.KvCache.allocate(NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, kv_dtype="int4")
    positions = torch.arange(num_tokens, dtype=torch.int32)
    order = torch.arange(HEAD_DIM, dtype=torch.int32).expand(NUM_KV_HEADS, -1).contiguous()
    feedback = torch.randn(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM).mul(0.1).triu(1)
    rounding = ops.KeyRounding(torch.zeros(NUM_KV_HEADS, HEAD_DIM), order, feedback)
    cos_sin = torch.rand(MAX_POSITION, HEAD_DIM)

    def run(key_rounding: ops.KeyRounding | None) -> None:
        ops.append_kv(q, k, v, positions, positions, cache, cos_sin=cos_sin, key_rounding=key_rounding)

    report.add("append_kv, keys with feedback", f"{num_tokens} tokens, bfloat16 to int4",
               interleave({"ours": lambda: run(rounding), "to the nearest": lambda: run(None)}, rounds=25))
