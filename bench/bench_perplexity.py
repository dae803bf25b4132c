"""Perplexity of SmolLM2-135M-Instruct by weights and KV cache, against llama.cpp on the same file and text.

The text comes with `--text FILE` (WikiText-2's test part in what is quoted); bench/perplexity.py says how it is scored.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.bench_model import shipped_file
from bench.peers.llama_cpp import LlamaCpp
from bench.perplexity import WINDOW_TOKENS, perplexity, window_logits, windows_of
from tilestream import LLM
from tilestream._native import _C


@pytest.fixture(scope="module")
def windows(request: pytest.FixtureRequest) -> list[list[int]]:
    path = request.config.getoption("--text")
    if path is None:
        pytest.skip("wants a text to score: --text FILE, at least 41,000 tokens of it")
    return windows_of(path)


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
    ours = perplexity(windows, lambda tokens: window_logits(llm, tokens, kv_dtype))
    weights = "Q4_1 and Q8_0 of the file, int8 activations" if dtype == "auto" else "the file's, dequantised to float32"
    report.add_values(
        "perplexity",
        f"weights: {weights}; KV {kv_dtype}",
        f"{ours:.4f}",
        "llama.cpp",
        f"{llama_perplexity:.4f}",
        ours / llama_perplexity,
    )
    benchmark.extra_info["over llama.cpp"] = ours / llama_perplexity
    benchmark.pedantic(lambda: window_logits(llm, windows[0], kv_dtype), rounds=1)
