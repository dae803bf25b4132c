"""All-reduce + residual + RMSNorm between two processes against gloo and torch, and against the plain all-reduce

Each rank has one thread, on a CPU of its own. Every call is timed alone: x is written anew, as a linear would, then the ranks
meet, then the clock starts. The limit is a copy of the bytes: x of both ranks and the residual, read and written once.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from bench.harness import Report
from bench.roofs import Work
from bench.two_ranks import SETTLE_S, connected, time_calls
from tilestream.ops import QuantisedRows
from tilestream.testing import Ranks

HIDDEN = 4096
EPS = 1e-5
ROUNDS = 15
PEERS = ("gloo + add + norm", "our plain all-reduce")


def measure(rank: int, num_tokens: int, quantised: bool) -> dict[str, list[float]]:
    """Seconds of each round, all ways in turn."""
    ranks = connected()
    fresh = torch.randn(num_tokens, HIDDEN)
    x = ranks.empty(fresh.nbytes).view(torch.float32).view(num_tokens, HIDDEN)
    residual, weight, private = torch.randn(num_tokens, HIDDEN), torch.rand(HIDDEN), torch.empty_like(fresh)
    int8 = None
    if quantised:
        like = QuantisedRows.empty(num_tokens, HIDDEN)
        int8 = QuantisedRows(*(ranks.empty(t.nbytes).view(t.dtype).view(t.shape) for t in (like.q, like.scale, like.sum)))

    def with_gloo() -> None:
        dist.all_reduce(private)
        residual.add_(private)
        torch.nn.functional.rms_norm(residual, (HIDDEN,), weight, EPS)

    ways = {
        "ours": (lambda: x.copy_(fresh), lambda: ranks.allreduce_rmsnorm(x, residual, weight, eps=EPS, int8=int8)),
        PEERS[0]: (lambda: private.copy_(fresh), with_gloo),
        PEERS[1]: (lambda: x.copy_(fresh), lambda: ranks.allreduce_rmsnorm(x, None, None, eps=EPS)),
    }
    num_calls = 50 if num_tokens <= 64 else 5
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        residual.normal_()
        for name, (prepare, run) in ways.items():
            time.sleep(SETTLE_S)
            times[name].append(time_calls(prepare, run, num_calls))
    return times


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 1024])
def test_allreduce_rmsnorm(num_tokens: int, quantised: bool, ranks: Ranks, report: Report) -> None:
    times = ranks.call(measure, num_tokens, quantised)[0]
    num_bytes = 4 * num_tokens * HIDDEN
    work = Work(2 * (2 + 1) * num_bytes, memory="copy", working_set=3 * num_bytes)
    report.add("allreduce_rmsnorm", f"{num_tokens} x {HIDDEN} {'to int8' if quantised else 'float32'}, 2 ranks", times, work=work)
