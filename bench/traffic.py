"""What is asked of the engines that bench_load.py and bench_goodput.py compare."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import NamedTuple


class Ask(NamedTuple):
    """One request: when it is sent, in seconds since the load began, and its lengths in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def all_at_once(num_requests: int, prompt_tokens: int, output_tokens: int) -> list[Ask]:
    """Requests of one shape, all sent in the beginning."""
    return [Ask(0.0, prompt_tokens, output_tokens)] * num_requests


def trace_lengths(path: str | Path, most_tokens: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of a trace's requests that take at most `most_tokens` together and at least 2 for the output.

    Args:
        path: a CSV with the columns ContextTokens and GeneratedTokens (the Azure LLM inference dataset's).
    """
    with open(path, newline="") as file:
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return [(prompt, output) for prompt, output in lengths if output >= 2 and prompt + output <= most_tokens]


def poisson(lengths: list[tuple[int, int]], requests_per_s: float, seconds: float) -> list[Ask]:
    """Requests that arrive independently of each other, their lengths drawn from `lengths`; the same at every call."""
    draw = random.Random(0)
    asks, now_s = [], draw.expovariate(requests_per_s)
    while now_s < seconds:
        asks.append(Ask(now_s, *draw.choice(lengths)))
        now_s += draw.expovariate(requests_per_s)
    return asks
