"""A decode step of a Llama 3 8B shape with random weights on a GPU, by the engine's runner: graphs, sampling, results read back

Each step is launched before the one before it is read, as the engine does. Time on the host's clock, over several steps.
Limit: the weights, without the embedding table, read once; at batch 32 the keys and values of 1024 tokens each, in bfloat16,
come on top of it (4.3 GB).
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.cuda.weights import RandomWeights
from bench.harness import Report
from bench.roofs import Work
from tilestream import SamplingParams
from tilestream.engine.config import EngineConfig
from tilestream.engine.request import Request
from tilestream.engine.runner import ModelRunner
from tilestream.engine.step_plan import StepPlan
from tilestream.layers.rope import RopeConfig
from tilestream.models.build import build_model
from tilestream.models.config import ModelConfig
from tilestream.ops import PackedFormat
from tilestream.placement import Placement

ROPE = RopeConfig(theta=500_000.0, rotary_dim=128)
LLAMA_3_8B = ModelConfig(
    family="llama", num_layers=32, hidden_size=4096, num_qo_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336,
    vocab_size=128_256, max_position=8192, rms_eps=1e-5, rope=ROPE, rope_local=ROPE, window_left=(-1,) * 32,
    sm_scale=128**-0.5,
)  # fmt: skip
CONTEXT, STEPS, ROUNDS = 1024, 32, 5
TOTAL = CONTEXT + STEPS * (ROUNDS + 1)


class Decodes:
    """Greedy requests that hold CONTEXT tokens each, with random keys and values, and step on together."""

    def __init__(self, model, batch_size: int) -> None:
        config = EngineConfig(kv_cache_tokens=batch_size * TOTAL, max_model_len=TOTAL, max_num_seqs=batch_size)
        self.runner = ModelRunner(model, config)
        for cache in self.runner.kv_caches:
            cache.k_cache.normal_()
            cache.v_cache.normal_()
        pages_each = TOTAL // config.page_size
        params = SamplingParams(temperature=0.0, max_tokens=TOTAL)
        self.requests = []
        for b in range(batch_size):
            request = Request(str(b), [1] * CONTEXT, CONTEXT, params, b, None, 0.0, TOTAL)
            request.num_computed_tokens = CONTEXT - 1
            request.pages = list(range(b * pages_each, (b + 1) * pages_each))
            self.requests.append(request)

    def run(self, num_steps: int) -> list[int]:
        """Returns the tokens of the last step."""
        before = None
        for _ in range(num_steps):
            plan = StepPlan()
            for request in self.requests:
                plan.add(request, 1)
            launched = self.runner.launch(plan)
            for row, request in enumerate(self.requests):
                request.num_computed_tokens += 1
                request.token_ids.append(-1 - row)
            if before is not None:
                self.runner.collect(before)
            before = launched
        return self.runner.collect(before).token_ids


@pytest.fixture(scope="module", params=[PackedFormat.ROWS_BFLOAT16, PackedFormat.U4G32S], ids=lambda f: f.name)
def model(request: pytest.FixtureRequest):
    weights = RandomWeights(request.param, Placement.of("cuda"))
    return build_model(LLAMA_3_8B, weights), weights.num_bytes, request.param.name


@pytest.mark.parametrize("batch_size", [1, 32])
def test_decode_step(batch_size: int, model, report: Report) -> None:
    llama, num_bytes, format_name = model
    decodes = Decodes(llama, batch_size)
    tokens = decodes.run(STEPS)  # captures the graph
    assert all(0 <= token < LLAMA_3_8B.vocab_size for token in tokens), "logits were not finite"
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decodes.run(STEPS)
        times.append((time.perf_counter() - start) / STEPS)
    case = f"{format_name}, batch {batch_size}, context {CONTEXT}"
    report.add("decode step", case, {"ours": times}, work=Work(num_bytes, memory="copy"))
