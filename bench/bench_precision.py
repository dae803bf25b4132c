"""One load by precision: 32 requests of 256 tokens in and 64 out, and the memory of weights and KV cache

`--quantised DIR`, what `tilestream quantize` made, adds INT4 activations in its INT4 blocks (on a CPU they run at INT8's rate).
"""

from __future__ import annotations

import random
import time

import pytest

from bench.harness import Report
from tilestream import LLM
from tilestream.cli.load import LoadResult, run_load, summarise

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 256, 64
ROUNDS = 3
KV_CACHE_TOKENS = 32 * 1024
BASE = "16 bits"


def test_precision(request: pytest.FixtureRequest, report: Report) -> None:
    common = {"kv_cache_tokens": KV_CACHE_TOKENS, "enable_prefix_caching": False}
    llms = {
        BASE: LLM(dtype="bfloat16", kv_dtype="bfloat16", **common),
        "W4A8KV8": LLM(act_bits="8", kv_dtype="int8", **common),
        "W4A8KV4": LLM(act_bits="8", kv_dtype="int4", **common),
    }
    for path in request.config.getoption("--quantised") or []:
        llms["W4AxKV4"] = LLM(path, act_bits="4", kv_dtype="int4", **common)
    draw = random.Random(0)
    prompts = [draw.choices(range(llms[BASE].tokenizer.vocab_size), k=PROMPT_TOKENS) for _ in range(NUM_REQUESTS)]
    results: dict[str, list[LoadResult]] = {name: [] for name in llms}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, llm in llms.items():
            times = run_load(llm.engine, prompts, OUTPUT_TOKENS)
            results[name].append(summarise(times, NUM_REQUESTS * PROMPT_TOKENS))
            time.sleep(0.1)  # idle threads go to sleep
    seconds = {name: [r.seconds for r in each[1:]] for name, each in results.items()}
    for name, llm in llms.items():
        rate = f"{sorted(r.output_tok_s for r in results[name][1:])[ROUNDS // 2]:.0f} out tok/s"
        pair = {"ours": seconds[name]} | ({} if name == BASE else {BASE: seconds[BASE]})
        report.add("load", name, pair, rate=rate)
        weights, kv = llm.weight_bytes, llm.kv_token_bytes * KV_CACHE_TOKENS
        report.add_text(
            "memory", name, f"{weights / 1e6:.0f} MB of weights, {kv / 1e6:.0f} MB of KV for {KV_CACHE_TOKENS} tokens"
        )
