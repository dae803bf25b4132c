"""The demo model gives the same answers as Hugging Face transformers on the same, dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.forward import all_logits
from tilestream import LLM, SamplingParams
from tilestream._native import _C
from tilestream.models.loader import resolve

NUM_TOKENS = 64
NEAR_TIE = 1e-3  # a gap of the two largest logits below which float32 rounding may decide
PROMPTS = (Path(__file__).parents[1] / "data" / "prompts.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def transformers_model(gguf_file: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def float32_llm() -> LLM:
    return LLM(dtype="float32", kv_cache_tokens=16384)


def greedy(**kw) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, **kw)


def test_greedy_tokens_and_logits(float32_llm: LLM, transformers_model) -> None:
    outputs = float32_llm.generate(PROMPTS, greedy(logprobs=5))
    near_ties = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = output.prompt_token_ids + output.token_ids
        assert len(output.token_ids) == NUM_TOKENS
        # One pass over prompt and answer: each answer token must be transformers' own choice after those before it,
        # so by induction its greedy answer is ours.
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([tokens])).logits[0, len(output.prompt_token_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        for position, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            best = int(logits[position].argmax())
            gap = float(logits[position, best] - logits[position, token])
            if token != best:
                near_ties += 1
                print(f"near-tie at token {position} of {prompt!r}: gap {gap:.2e}")
            assert gap <= NEAR_TIE, f"{prompt!r}, token {position}: ours {token}, transformers {best}, gap {gap}"
            for top_token, top_logprob in entry.top:
                assert abs(top_logprob - float(logprobs[position, top_token])) <= 1e-3
    assert near_ties <= 2


def test_logits_within_1e_3(float32_llm: LLM, transformers_model) -> None:
    """Every logit of every position of a prompt, through the engine's own paged, chunked forward."""
    tokens = [t for prompt in PROMPTS for t in float32_llm.tokenizer.encode(prompt)][:256]
    ours = all_logits(float32_llm, tokens)
    with torch.inference_mode():
        theirs = transformers_model(torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).abs().max()) <= 1e-3


@pytest.fixture(scope="module")
def reference_outputs() -> list[list[int]]:
    llm = LLM(batch_invariant=True, kv_cache_tokens=16384, enable_prefix_caching=False, max_num_seqs=1)
    return [llm.generate(prompt, greedy()).pop().token_ids for prompt in PROMPTS[:8]]


@pytest.fixture
def restore_threads():
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(kv_cache_tokens=16384), id="one batch, prefix reuse"),
        pytest.param(dict(kv_cache_tokens=16384, token_budget=48), id="small chunks"),
        pytest.param(dict(kv_cache_tokens=480, page_size=16, max_model_len=256), id="preemption"),
        *[pytest.param(dict(kv_cache_tokens=16384, num_threads=n), id=f"{n} threads") for n in (1, 2, 3, 7, 16, 64)],
    ],
)
def test_batch_invariant_is_bitwise(reference_outputs: list[list[int]], options: dict, restore_threads) -> None:
    """Alone and in a batch, whole and in chunks, cached, preempted: the same tokens with the same logprobs."""
    llm = LLM(batch_invariant=True, **options)
    first = llm.generate(PROMPTS[:8], greedy(logprobs=0))
    again = llm.generate(PROMPTS[:8], greedy(logprobs=0))
    assert [o.token_ids for o in first] == reference_outputs
    assert [o.token_ids for o in again] == reference_outputs
    assert [[e.logprob for e in o.logprobs] for o in first] == [[e.logprob for e in o.logprobs] for o in again]
    if options.get("kv_cache_tokens") == 480:
        assert llm.engine.metrics.num_preemptions > 0
    if "token_budget" not in options and options["kv_cache_tokens"] != 480:
        assert all(o.num_cached_tokens > 0 for o in again if len(o.prompt_token_ids) > 32)
