"""A load: requests of 256 tokens in and 64 out, all sent at once, against llama.cpp and vLLM's CPU build

Ours and llama.cpp run the same Q4_0 file, vLLM the same weights in bfloat16. "over HTTP" is `tilestream serve` in a
process of its own with a streaming client here; the others run without a server. vLLM: only after `make bench-vllm`.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.bench_model import q4_0_file, scheduler_share, shipped_file
from bench.harness import Report
from bench.peers import vllm_cpu
from bench.peers.llama_cpp import LlamaCpp
from bench.server import ask_all, served
from bench.traffic import Ask, all_at_once
from tilestream import LLM
from tilestream._native import _C
from tilestream.cli.load import LoadResult, RequestTimes, run_load, summarise

PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
LOADS = [1, 8, 32]
ROUNDS = 3
KV_CACHE_TOKENS = 32 * 1024
VOCAB_SIZE = 49_152  # SmolLM2's

Load = Callable[[int], list[RequestTimes]]  # answers that many requests


class Ours:
    """The engine in this process."""

    def __init__(self, path: Path) -> None:
        self.llm = LLM(path, kv_cache_tokens=KV_CACHE_TOKENS, enable_prefix_caching=False)
        self.scheduler_shares: dict[int, list[float]] = {}

    def __call__(self, num_requests: int) -> list[RequestTimes]:
        prompts = random_prompts([PROMPT_TOKENS] * num_requests)
        before = self.llm.engine.metrics
        times = run_load(self.llm.engine, prompts, OUTPUT_TOKENS)
        share = scheduler_share(before, self.llm.engine.metrics)
        self.scheduler_shares.setdefault(num_requests, []).append(share)
        return times


def asks(num_requests: int) -> list[Ask]:
    return all_at_once(num_requests, PROMPT_TOKENS, OUTPUT_TOKENS)


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [random.choices(range(VOCAB_SIZE), k=length) for length in lengths]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Load]]:
    """All loaded before the first is timed; who waits sleeps."""
    path = q4_0_file()
    llama_cpp = LlamaCpp(path, num_threads=_C.num_threads(), max_seqs=max(LOADS), max_tokens=KV_CACHE_TOKENS)
    with served(path, "--no-prefix-caching", "--kv-cache-tokens", str(KV_CACHE_TOKENS)) as url:
        found = {
            "ours": Ours(path),
            "ours, over HTTP": lambda n: asyncio.run(ask_all(url, random_prompts([PROMPT_TOKENS] * n), asks(n))),
            "llama.cpp Q4_0": lambda n: [RequestTimes(*t) for t in llama_cpp.load(asks(n))],
        }
        if not vllm_cpu.PYTHON.exists():
            yield found
            return
        checkpoint = vllm_cpu.bf16_checkpoint(shipped_file())
        vllm = vllm_cpu.VllmCpu(checkpoint, num_threads=_C.num_threads())
        yield found | {"vLLM CPU bf16": lambda n: [RequestTimes(*t) for t in vllm.load(asks(n))]}
        vllm.close()


@pytest.mark.parametrize("num_requests", LOADS)
def test_load(engines: dict[str, Load], num_requests: int, report: Report) -> None:
    results: dict[str, list[LoadResult]] = {name: [] for name in engines}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, load in engines.items():
            results[name].append(summarise(load(num_requests), num_requests * PROMPT_TOKENS))
            time.sleep(0.1)  # idle threads go to sleep
    rounds = {name: each[1:] for name, each in results.items()}
    median = sorted(rounds["ours"], key=lambda result: result.seconds)[ROUNDS // 2]
    case = f"{num_requests} x {PROMPT_TOKENS}/{OUTPUT_TOKENS}"
    rate = f"{median.output_tok_s:.0f} out tok/s, {median.total_tok_s:.0f} in all"
    report.add("load", case, {name: [r.seconds for r in each] for name, each in rounds.items()}, rate=rate)
    report.add("TTFT, median", case, {name: [r.ttft_median_s for r in each] for name, each in rounds.items()})
    report.add("TPOT, median", case, {name: [r.tpot_median_s for r in each] for name, each in rounds.items()})
    share = statistics.median(engines["ours"].scheduler_shares[num_requests][1:])
    report.add_text("scheduler's Python", case, f"{share:.1%} of the steps' time", limit="goal 3%")
