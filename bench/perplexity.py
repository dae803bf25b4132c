"""Perplexity as both benches of it score: windows of 512 tokens, the second half of each counts, so that every scored token has
at least 256 tokens of context (as in llama.cpp's own perplexity tool)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from tests.engine.forward import all_logits
from tilestream import LLM

WINDOW_TOKENS = 512
NUM_WINDOWS = 80  # 20,480 scored tokens


def windows_of(path: str) -> list[list[int]]:
    """A text's first windows."""
    tokens = LLM(kv_cache_tokens=4096).tokenizer.encode(Path(path).read_text())
    assert len(tokens) >= NUM_WINDOWS * WINDOW_TOKENS, f"{path} has {len(tokens)} tokens"
    return [tokens[i * WINDOW_TOKENS : (i + 1) * WINDOW_TOKENS] for i in range(NUM_WINDOWS)]


def perplexity(windows: list[list[int]], logits_of: Callable[[list[int]], torch.Tensor]) -> float:
    """Of what `logits_of` a window says, [tokens, vocabulary]."""
    total, first = 0.0, WINDOW_TOKENS // 2
    for window in windows:
        logprobs = logits_of(window)[first - 1 : -1].double().log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(window[first:])[:, None]).sum())
    return math.exp(total / (len(windows) * (WINDOW_TOKENS - first)))


def window_logits(llm: LLM, tokens: list[int], kv_dtype: str) -> torch.Tensor:
    """Of all tokens of a window, computed at once."""
    return all_logits(llm, tokens, chunk=WINDOW_TOKENS, kv_dtype=kv_dtype)
