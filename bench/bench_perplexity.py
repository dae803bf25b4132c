"""Perplexity of SmolLM2-135M-Instruct by weights and KV cache, against llama.cpp on the same file and text.

The text comes with `--text FILE` (WikiText-2's test part in what is quoted). Windows of 512 tokens; the second half of
each is scored, so that every scored token has at least 256 tokens of context (as llama.cpp's own perplexity tool does).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.bench_model import shipped_file
from bench.peers.llama_cpp import LlamaCpp
from tests.engine.forward import all_logits
from tilestream import LLM
from tilestream._native import _C

WINDOW_TOKENS = 512
NUM_WINDOWS = 80  # 20,480 scored tokens


@pytest.fixture(scope="module")
def windows(request: pytest.FixtureRequest) -> list[list[int]]:
    path = request.config.getoption("--text")
    if path is None:
        pytest.skip("wants a text to score: --text FILE, at least 41,000 tokens of it")
    tokens = LLM(kv_cache_tokens=4096).tokenizer.encode(Path(path).read_text())
    assert len(tokens) >= NUM_WINDOWS * WINDOW_TOKENS, f"{path} has {len(tokens)} tokens"
    return [tokens[i * WINDOW_TOKENS : (i + 1) * WINDOW_TOKENS] for i in range(NUM_WINDOWS)]


def perplexity(windows: list[list[int]], logits_of) -> float:
    total, first = 0.0, WINDOW_TOKENS // 2
    for window in windows:
        logprobs = logits_of(window)[first - 1 : -1].double().log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(window[first:])[:, None]).sum())
    return math.exp(total / (len(windows) * (WINDOW_TOKENS - first)))


@pytest.fixture(scope="module")
def llama_perplexity(windows: list[list[int]]) -> float:
    peer = LlamaCpp(shipped_file(), num_threads=_C.num_threads(), max_seqs=1, max_tokens=WINDOW_TOKENS)
    return perplexity(windows, lambda tokens: torch.from_numpy(np.array(peer.logits(tokens))))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("auto", "float32"), ("auto", "bfloat16"), ("auto", "fp8"), ("auto", "int8"), ("auto", "int4")],
)
def test_perplexity(windows, llama_perplexity: float, report, benchmark, dtype: str, kv_dtype: str) -> None:
    llm = LLM(dtype=dtype, kv_cache_tokens=4096)
    ours = perplexity(windows, lambda tokens: all_logits(llm, tokens, chunk=WINDOW_TOKENS, kv_dtype=kv_dtype))
    weights = "Q4_1 and Q8_0 of the file, int8 activations" if dtype == "auto" else "the file's, dequantised to float32"
    report.add_values("perplexity", f"weights: {weights}; KV {kv_dtype}", f"{ours:.4f}", "llama.cpp", f"{llama_perplexity:.4f}", ours / llama_perplexity)
    benchmark.extra_info["over llama.cpp"] = ours / llama_perplexity
    benchmark.pedantic(lambda: all_logits(llm, windows[0], chunk=WINDOW_TOKENS, kv_dtype=kv_dtype), rounds=1)
