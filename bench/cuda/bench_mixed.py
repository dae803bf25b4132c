"""A chunk of a prompt beside decodes on a GPU, in one launch, against the best serial pair and FlashInfer's fused kernels

The serial pair: the fastest peer for the chunk and the fastest for the decodes, each timed alone, added. The chunk's tokens are
the last of as many as the decodes have, or a whole prompt.
"""

from __future__ import annotations

import math
import statistics

import pytest

from bench import goals
from bench.cuda.attention_batch import Batch, Pages, fastest, sdpa
from bench.cuda.timing import interleave, num_sets
from bench.harness import Report
from bench.peers import flashinfer
from bench.roofs import Work
from bench.sm90_model import MIXES

HEADS = (32, 8, 128)
OP = f"mixed, bfloat16; goal {goals.MIXED_RATIO:g} x the serial pair"


@pytest.fixture(scope="module")
def ratios() -> list[float]:
    """Of the cases so far, over the serial pair."""
    return []


@pytest.mark.parametrize(("chunk", "num_decodes", "kv_len"), MIXES, ids=str)
def test_mixed(chunk: int, num_decodes: int, kv_len: int, ratios: list[float], report: Report) -> None:
    num_qo_heads, num_kv_heads, head_dim = HEADS
    kv_lens = [max(chunk, kv_len)] + [kv_len] * num_decodes
    num_bytes = sum(kv_lens) * Pages.bytes_of_a_token(num_kv_heads, head_dim, "bfloat16")
    sets = num_sets(num_bytes)
    pages = Pages(kv_lens, num_kv_heads, head_dim, sets=sets)
    batch = Batch(pages, [chunk] + [1] * num_decodes, num_qo_heads)
    batch.check()
    alone = {"chunk": Batch(pages, [chunk], num_qo_heads), "decodes": Batch(pages, [1] * num_decodes, num_qo_heads, first=1)}
    peers = {
        "chunk": sdpa(alone["chunk"]) | flashinfer.prefill(alone["chunk"].paged),
        "decodes": sdpa(alone["decodes"]) | flashinfer.decode(alone["decodes"].paged),
    }
    candidates = {("both", "ours"): batch.ours} | {
        ("both", name): run for name, run in batch.working(flashinfer.mixed(batch.paged)).items()
    }
    for part, own in alone.items():
        candidates |= {(part, name): run for name, run in ({"ours": own.ours} | own.working(peers[part])).items()}
    measured = interleave(candidates, sets)

    def times(part: str) -> dict[str, list[float]]:
        return {name: seconds for (of, name), seconds in measured.items() if of == part}

    own_parts = [statistics.median(times(part)["ours"]) for part in alone]
    shown = times("both") | {
        f"ours, the larger part alone; goal {1 / goals.MIXED_OVER_LARGER_PART:.2f}": [max(own_parts)],
        "ours, two launches": [sum(own_parts)],
    }
    of_peers = [{name: seconds for name, seconds in times(part).items() if name != "ours"} for part in alone]
    what = f"{chunk} + {num_decodes} x 1 over {kv_len}, heads {HEADS}"
    if all(of_peers):
        names = [fastest(part) for part in of_peers]
        pair = sum(statistics.median(part[name]) for part, name in zip(of_peers, names))
        shown[f"serial pair: {names[0]}, {names[1]}"] = [pair]
        ratios.append(pair / statistics.median(shown["ours"]))
    report.add(OP, what, shown, work=Work(num_bytes, batch.num_ops(), "bf16", memory="read"))


def test_mean(ratios: list[float], report: Report) -> None:
    if not ratios:
        pytest.skip("no peer took a chunk and decodes")
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    report.add_text(OP, f"geometric mean of {len(ratios)}", f"{mean:.2f} x the serial pair")
