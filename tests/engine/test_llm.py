"""The public `LLM` object: batches, streams, refusals, and the engine on its own thread."""

from __future__ import annotations

import asyncio

import pytest

from tilestream import LLM, SamplingParams
from tilestream.engine.errors import PromptTooLongError
from tilestream.models import ModelLoadError
from tilestream.ops.kv_cache import KV_DTYPES

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_tokens=4096, max_model_len=512, max_queued_requests=4)


def test_stream_is_generate(llm: LLM) -> None:
    whole = llm.generate("The three laws of thermodynamics are", GREEDY)[0]
    deltas = list(llm.stream("The three laws of thermodynamics are", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert deltas[-1].finish_reason == whole.finish_reason == "length"


def test_streams_and_batches_take_turns(llm: LLM) -> None:
    prompts = ["One, two,", "The sky is", "Paris is"]
    want = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    first, second = llm.stream(prompts[0], GREEDY), llm.stream(prompts[1], GREEDY)
    pairs = [(next(first), next(second)) for _ in range(3)]
    assert llm.generate(prompts[2], GREEDY)[0].token_ids == want[2]
    for got, begun, rest in zip(want, zip(*pairs, strict=True), (first, second), strict=False):
        assert [token for delta in (*begun, *rest) for token in delta.token_ids] == got


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_kv_dtype(kv_dtype: str) -> None:
    llm = LLM(kv_dtype=kv_dtype, kv_cache_tokens=256)
    assert llm.engine.runner.kv_caches[0].k_cache.dtype == KV_DTYPES[kv_dtype]
    assert "Paris" in llm.generate("The capital of France is", GREEDY)[0].text


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    prompts = [f"Count from {i} to" for i in range(12)]
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=i + 1, temperature=0.0, ignore_eos=True) for i in range(12)])
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == list(range(1, 13))


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**31 - 1},
        {"top_p": 1e-320},
        {"min_p": 1e-320},
        {"temperature": 1e-320},
        {"temperature": 1e300},
        {"repetition_penalty": 0.001},
        {"repetition_penalty": 1000.0},
        {"max_tokens": 10**30, "min_tokens": 5, "stop_token_ids": (10**30,)},
    ],
)
def test_no_parameter_fails_the_step_of_all(llm: LLM, extreme: dict) -> None:
    params = [SamplingParams(**{"max_tokens": 4} | extreme), GREEDY]
    assert [output.error for output in llm.generate(["Paris is", "London is"], params)] == [None, None]


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work()
    llm.engine.scheduler.check_invariants()


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([""], GREEDY, ValueError, "the prompt is empty"),
        ([[5] * 512], GREEDY, PromptTooLongError, "has 512 tokens, but at most 511"),
        ([[49152]], GREEDY, ValueError, r"prompt_token_ids\[0\] is 49152; token ids are 0..49151"),
        (["a", "b"], [GREEDY], ValueError, "2 prompts but 1 params"),
    ],
)
def test_refusals_leave_nothing_behind(llm: LLM, prompts, params, error, message) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, params)
    assert not llm.engine.has_work()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_dtype="int3"), "kv_dtype is 'int3'; supported: auto, float32"),
        (dict(page_size=24), r"page_size must be one of \(16, 32, 64\), got 24"),
        (dict(max_model_len=100_000), "max_model_len is 100000; this model's positions end at 8192"),
        (dict(model="no-such-model"), "no-such-model"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((ValueError, ModelLoadError), match=message):
        LLM(**options)


async def test_async_engine() -> None:
    llm = LLM(kv_cache_tokens=4096)
    want = {text: llm.generate(text, GREEDY)[0].text for text in ("One, two,", "The sky is")}

    async def answer(text: str) -> str:
        stream = llm.async_engine.stream(text, llm.tokenizer.encode(text), GREEDY)
        return "".join([delta.text async for delta in stream])

    assert await asyncio.gather(*(answer(text) for text in want)) == list(want.values())
    with pytest.raises(RuntimeError, match="use async_engine.stream"):
        llm.generate("One, two,", GREEDY)
    llm.async_engine.shutdown()
