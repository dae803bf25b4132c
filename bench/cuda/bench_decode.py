"""Decodes on a GPU against torch SDPA (flash, cuDNN) and, where it is installed, FlashInfer (its own decode, XQA)

Rates count K and V once, as they are stored. Ours and FlashInfer read the same shuffled pages; SDPA reads contiguous K and V in
bfloat16, whatever the cache is. A shared prefix counts once.
"""

from __future__ import annotations

import math
import random

import pytest

from bench import goals
from bench.cuda.attention_batch import Batch, Pages, sdpa, with_best
from bench.cuda.timing import Run, interleave, num_sets
from bench.harness import Report
from bench.peers import flashinfer
from bench.roofs import Work

GQA_4, GQA_8 = (32, 8, 128), (32, 4, 128)  # num_qo_heads, num_kv_heads, head_dim
LARGE = [(8, 8192), (32, 8192), (128, 8192), (8, 32768), (1, 131072)]
QUANTISED = [(kv_dtype, batch_size) for kv_dtype in ("fp8", "int8") for batch_size in (32, 128)] + [("int4", 32)]
LENGTH_QUANTISED = 8192
PREFIX, OWN, NUM_SHARING = 4096, 256, 64
NUM_SKEWED, MEDIAN_SKEWED, MAX_SKEWED = 64, 2048, 65536


def skewed_lengths() -> list[int]:
    """Log-normal: a few requests hold most of the tokens."""
    draw = random.Random(0)
    return [min(MAX_SKEWED, math.ceil(draw.lognormvariate(math.log(MEDIAN_SKEWED), 1.2))) for _ in range(NUM_SKEWED)]


class Decodes:
    """A checked batch, and as many sets of its pages as it takes for memory, not L2, to serve them."""

    def __init__(self, kv_lens: list[int], heads: tuple[int, int, int], kv_dtype: str = "bfloat16", *, shared: int = 0) -> None:
        num_qo_heads, num_kv_heads, head_dim = heads
        num_tokens = sum(kv_lens) - shared * (len(kv_lens) - 1)
        self.num_bytes = num_tokens * Pages.bytes_of_a_token(num_kv_heads, head_dim, kv_dtype)
        self.sets = num_sets(self.num_bytes)
        pages = Pages(kv_lens, num_kv_heads, head_dim, kv_dtype, sets=self.sets, prefix=shared)
        self.batch = Batch(pages, [1] * len(kv_lens), num_qo_heads, prefix=shared)
        self.batch.check()

    def peers(self) -> dict[str, Run]:
        return sdpa(self.batch) | flashinfer.decode(self.batch.paged)

    def add(self, report: Report, op: str, what: str, peers: dict[str, Run]) -> None:
        times = interleave({"ours": self.batch.ours} | self.batch.working(peers), self.sets)
        report.add(op, what, with_best(times), work=Work(self.num_bytes, self.batch.num_ops(), "bf16", memory="read"))


@pytest.mark.parametrize(("batch_size", "kv_len"), LARGE, ids=str)
def test_bfloat16(batch_size: int, kv_len: int, report: Report) -> None:
    decodes = Decodes([kv_len] * batch_size, GQA_4)
    op = f"decode, bfloat16 KV; goal {goals.DECODE_SHARE:.0%} of read"
    decodes.add(report, op, f"{batch_size} x {kv_len}, heads {GQA_4}", decodes.peers())


@pytest.mark.parametrize("kv_len", [1024, 2048, 4096])
@pytest.mark.parametrize("heads", [GQA_4, GQA_8], ids=str)
def test_one_request(kv_len: int, heads: tuple[int, int, int], report: Report) -> None:
    decodes = Decodes([kv_len], heads)
    op = f"decode, one request; goal {goals.DECODE_BATCH_1_US:g} us"
    decodes.add(report, op, f"1 x {kv_len}, heads {heads}", decodes.peers())


@pytest.mark.parametrize(("kv_dtype", "batch_size"), QUANTISED, ids=str)
def test_quantised(kv_dtype: str, batch_size: int, report: Report) -> None:
    """FlashInfer has no integer caches like these."""
    decodes = Decodes([LENGTH_QUANTISED] * batch_size, GQA_4, kv_dtype)
    op = f"decode, {kv_dtype} KV" + ("" if kv_dtype == "int4" else f"; goal {goals.DECODE_SHARE_8BIT:.0%} of read")
    peers = decodes.peers() if kv_dtype == "fp8" else sdpa(decodes.batch)
    decodes.add(report, op, f"{batch_size} x {LENGTH_QUANTISED}, heads {GQA_4}", peers)


def test_skewed_lengths(report: Report) -> None:
    kv_lens = skewed_lengths()
    decodes = Decodes(kv_lens, GQA_4)
    op = f"decode, skewed lengths; goal {goals.SKEWED_DECODE_RATIO:g} x the best"
    what = f"{len(kv_lens)} requests of {min(kv_lens)} to {max(kv_lens)}, {sum(kv_lens)} tokens, heads {GQA_4}"
    decodes.add(report, op, what, flashinfer.decode(decodes.batch.paged))


def test_shared_prefix(report: Report) -> None:
    """Planned with the prefix as a group; against the same batch, over the same pages, without."""
    decodes = Decodes([PREFIX + OWN] * NUM_SHARING, GQA_4, shared=PREFIX)
    together = decodes.batch
    apart = Batch(together.pages, together.q_lens, GQA_4[0])
    apart.q = together.q
    peers = {"ours, unshared": apart.ours} | flashinfer.cascade(together.paged, PREFIX)
    op = f"decode, shared prefix; goal {goals.CASCADE_RATIO:g} x unshared"
    decodes.add(report, op, f"{NUM_SHARING} x ({PREFIX} + {OWN}), heads {GQA_4}", peers)
