"""Goodput: the most requests per second of which nine in ten keep both limits, 2 s to the first token and 100 ms for each after

Poisson arrivals; lengths of `--lengths FILE`, requests of up to 2,048 tokens (the Azure conversation trace of 2023 in what is
quoted). Ours is `tilestream serve` over HTTP with a target of 80 ms a step, llama.cpp runs the same Q4_0 file without a server,
vLLM the same weights in bfloat16 without one (`make bench-vllm`). Rates rise by half until one is too much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from bench.bench_load import KV_CACHE_TOKENS, random_prompts
from bench.bench_model import q4_0_file, shipped_file
from bench.harness import Report
from bench.peers import vllm_cpu
from bench.peers.llama_cpp import LlamaCpp
from bench.server import ask_all, served
from bench.traffic import Ask, poisson, trace_lengths
from tilestream._native import _C
from tilestream.cli.load import RequestTimes

TTFT_S, TPOT_S, SHARE = 2.0, 0.1, 0.9
LOAD_S = 60.0
FIRST_RATE, GROWTH = 0.1, 1.5
MOST_TOKENS = 2048
MAX_SEQS = 16

Load = Callable[[list[Ask]], list[RequestTimes]]


@pytest.fixture(scope="module")
def lengths(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    path = request.config.getoption("--lengths")
    if path is None:
        pytest.skip("wants a trace to draw lengths from: --lengths FILE")
    return trace_lengths(path, MOST_TOKENS)


@pytest.fixture(scope="module")
def engines(lengths) -> Iterator[dict[str, Load]]:
    """All loaded before the first is timed; who waits sleeps."""
    path = q4_0_file()
    llama_cpp = LlamaCpp(path, num_threads=_C.num_threads(), max_seqs=MAX_SEQS, max_tokens=MAX_SEQS * MOST_TOKENS)
    options = ("--no-prefix-caching", "--kv-cache-tokens", str(KV_CACHE_TOKENS), "--tbt-ms", "80")
    with served(path, *options) as url:
        found = {
            "ours": lambda asks: asyncio.run(ask_all(url, random_prompts([a.prompt_tokens for a in asks]), asks)),
            "llama.cpp Q4_0": lambda asks: [RequestTimes(*t) for t in llama_cpp.load(asks)],
        }
        if not vllm_cpu.PYTHON.exists():
            yield found
            return
        vllm = vllm_cpu.VllmCpu(vllm_cpu.bf16_checkpoint(shipped_file()), num_threads=_C.num_threads())
        yield found | {"vLLM CPU bf16": lambda asks: [RequestTimes(*t) for t in vllm.load(asks)]}
        vllm.close()


def share_within(times: list[RequestTimes]) -> float:
    """The share of requests that kept both limits."""
    kept = [
        t.first_token_s - t.sent_s <= TTFT_S and t.end_s - t.first_token_s <= TPOT_S * (t.num_output_tokens - 1) for t in times
    ]
    return sum(kept) / len(kept)


def goodput(load: Load, lengths: list[tuple[int, int]]) -> float:
    """Requests per second; 0 if the first rate is too much."""
    best, rate = 0.0, FIRST_RATE
    while share_within(load(poisson(lengths, rate, LOAD_S))) >= SHARE:
        best, rate = rate, rate * GROWTH
    return best


def test_goodput(engines: dict[str, Load], lengths: list[tuple[int, int]], report: Report) -> None:
    case = f"TTFT {TTFT_S:g} s, TPOT {1000 * TPOT_S:g} ms"
    found = {name: goodput(load, lengths) for name, load in engines.items()}
    ours = found.pop("ours")
    for name, theirs in found.items():
        shown = f"{theirs:.2f}" if theirs else f"less than {FIRST_RATE}"
        report.add_values("requests/s", case, f"{ours:.2f}", name, shown, ours / (theirs or FIRST_RATE))
