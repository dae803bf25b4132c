"""Causal prefill on a GPU against torch SDPA (flash, cuDNN) and, where it is installed, FlashInfer (fa2, fa3)

Rates count the causal half. Ours and FlashInfer read shuffled pages; SDPA, and FlashInfer's "no pages", contiguous K and V.
"""

from __future__ import annotations

import pytest
import torch

from bench import goals
from bench.cuda.attention_batch import Batch, Pages, sdpa, with_best
from bench.cuda.timing import interleave
from bench.harness import Report
from bench.peers import flashinfer
from bench.roofs import Work
from bench.sm90_model import LENGTHS, prefill_heads

TOKENS = 16384  # of all requests together
CASES = [(head_dim, length) for head_dim in (64, 128) for length in LENGTHS] + [(256, 4096), (256, 16384)]
FP8_CASES = [(128, 4096), (128, 16384)]


def prefill(head_dim: int, length: int, kv_dtype: str, *, float8_q: bool = False) -> Batch:
    heads, num_requests = prefill_heads(head_dim), max(1, TOKENS // length)
    pages = Pages([length] * num_requests, heads.num_kv, head_dim, kv_dtype)
    batch = Batch(pages, [length] * num_requests, heads.num_qo, float8_q=float8_q)
    batch.check()
    return batch


def add(report: Report, op: str, batch: Batch, peers: dict, arithmetic: str) -> None:
    times = interleave({"ours": batch.ours} | batch.working(peers), 1)
    num_qo_heads, num_kv_heads, head_dim, _ = batch.paged.shape
    row_bytes = Pages.bytes_of_a_token(num_kv_heads, head_dim, batch.pages.kv_dtype)
    num_bytes = 2 * batch.q.nbytes + sum(batch.kv_lens) * row_bytes
    what = f"{len(batch.q_lens)} x {batch.q_lens[0]}, heads ({num_qo_heads}, {num_kv_heads}, {head_dim})"
    report.add(op, what, with_best(times), work=Work(num_bytes, batch.num_ops(), arithmetic, memory="copy"))


@pytest.mark.parametrize(("head_dim", "length"), CASES, ids=str)
def test_bfloat16(head_dim: int, length: int, report: Report) -> None:
    batch = prefill(head_dim, length, "bfloat16")
    k, v = map(torch.cat, zip(*(batch.pages.bfloat16_tokens(0, b) for b in range(len(batch.q_lens)))))
    peers = sdpa(batch) | flashinfer.prefill(batch.paged, (k, v))
    goal = f"{goals.prefill_ratio(head_dim, length):.2f} x the best"
    if head_dim == 128 and length >= 4096:
        goal += f", {goals.PREFILL_TFLOPS} Top/s"
    add(report, f"causal prefill, bfloat16; goal {goal}", batch, peers, "bf16")


@pytest.mark.parametrize(("head_dim", "length"), FP8_CASES, ids=str)
def test_fp8(head_dim: int, length: int, report: Report) -> None:
    """The goal is over cuDNN's fp8, which torch does not offer. Products of e4m3, of ours too."""
    batch = prefill(head_dim, length, "fp8", float8_q=True)
    peers = flashinfer.prefill(batch.paged) | flashinfer.fp8_prefill(batch.paged)
    add(report, f"causal prefill, fp8; goal {goals.FP8_PREFILL_RATIO:.2f} x the best fp8", batch, peers, "int8")
