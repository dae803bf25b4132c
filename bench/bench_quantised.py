"""Perplexity and greedy agreement of SmolLM2-135M-Instruct by precision, against the same weights in bfloat16.

The text comes with `--text FILE` (WikiText-2's test part in what is quoted), directories of `tilestream quantize` with
`--quantised DIR`, once for each. bench/perplexity.py says how it is scored. Agreement: of 64 tokens that bfloat16 answers to
each prompt greedily, how many are also the likeliest by this precision, given the same tokens before.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.perplexity import perplexity, window_logits, windows_of
from tilestream import LLM, SamplingParams

_PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "prompts.txt"
_NUM_PROMPTS, _ANSWER_TOKENS = 16, 64
# name -> (act_bits, kv_dtype)
_PRECISIONS = {"W4A8KV8": ("8", "int8"), "W4A8KV4": ("8", "int4"), "W4AxKV4": ("4", "int4")}


@pytest.fixture(scope="module")
def windows(request: pytest.FixtureRequest) -> list[list[int]]:
    path = request.config.getoption("--text")
    if path is None or not request.config.getoption("--quantised"):
        pytest.skip("wants a text to score, --text FILE, and what `tilestream quantize` made, --quantised DIR")
    return windows_of(path)


@pytest.fixture(scope="module")
def answers(windows: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of the model in bfloat16."""
    llm = LLM(dtype="bfloat16", kv_cache_tokens=8192)
    prompts = [
        llm.tokenizer.encode(llm.tokenizer.apply_chat_template([{"role": "user", "content": line}]), add_special_tokens=False)
        for line in _PROMPTS.read_text().splitlines()[:_NUM_PROMPTS]
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0.0, ignore_eos=True))
    return [(o.prompt_token_ids, o.token_ids) for o in outputs]


def _agreement(llm: LLM, answers: list[tuple[list[int], list[int]]], kv_dtype: str) -> float:
    same = total = 0
    for prompt, answer in answers:
        logits = window_logits(llm, prompt + answer[:-1], kv_dtype)
        same += sum(a == b for a, b in zip(logits[len(prompt) - 1 :].argmax(-1).tolist(), answer, strict=True))
        total += len(answer)
    return same / total


def _score(llm: LLM, windows: list[list[int]], kv_dtype: str) -> float:
    return perplexity(windows, lambda tokens: window_logits(llm, tokens, kv_dtype))


def test_quantised(windows, answers, report, benchmark, request: pytest.FixtureRequest) -> None:
    plain = LLM(dtype="bfloat16", kv_cache_tokens=4096)
    base = _score(plain, windows, "bfloat16")
    report.add_values("perplexity", "bfloat16, KV bfloat16", f"{base:.4f}", "", "", 1.0)
    for path in request.config.getoption("--quantised"):
        facts = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
        name = f"{facts['method']}, groups of {facts['group_size']}, {facts['int4_share']:.1%} INT4"
        for precision, (act_bits, kv_dtype) in _PRECISIONS.items():
            if act_bits == "4" and not facts["int4_share"]:
                continue
            llm = LLM(path, act_bits=act_bits, kv_cache_tokens=4096)
            ours, same = _score(llm, windows, kv_dtype), _agreement(llm, answers, kv_dtype)
            case = f"{precision}: {name}; {same:.1%} greedy agreement"
            report.add_values("perplexity", case, f"{ours:.4f}", "bfloat16", f"{base:.4f}", ours / base)
    benchmark.pedantic(lambda: window_logits(plain, windows[0], "bfloat16"), rounds=1)
