"""The real `openai` client against a real uvicorn on 127.0.0.1."""

from __future__ import annotations

import asyncio
import socket

import httpx
import openai
import pytest

from .conftest import MODEL, wait_until
from .fakes import ANSWER, MAX_MODEL_LEN, FakeAsyncEngine

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(live_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0.3, seed=1, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == ANSWER.encode()[1:9].decode()
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "r"
    assert answer.usage.completion_tokens == 8 and answer.usage.prompt_tokens_details.cached_tokens == 2


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER.encode()[:30].decode()
    assert chunks[-1].usage.completion_tokens == 30 and chunks[-1].choices == []


def test_completion_and_stream(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 12, "n": 2, "seed": 9}
    whole = client.completions.create(**fields)
    streamed = {i: "" for i in range(4)}
    for chunk in client.completions.create(**fields, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in whole.choices}


def test_vllms_extra_fields(client: openai.OpenAI, live_engine: FakeAsyncEngine) -> None:
    client.completions.create(model=MODEL, prompt="x", extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True})
    _, params = live_engine.seen[-1]
    assert (params.top_k, params.min_p, params.ignore_eos) == (3, 0.1, True)


def test_scheduling_fields(client: openai.OpenAI, live_engine: FakeAsyncEngine) -> None:
    extra = {"priority": 2, "cache_salt": "mine", "timeout": 30}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, extra_body=extra)
    options = live_engine.seen_options[-1]
    assert (options.priority, options.cache_salt) == (2, "mine") and options.deadline_s is not None
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the deadline has passed") as late:
            client.completions.create(model=MODEL, prompt="TOO LATE", extra_body={"timeout": 1}, stream=stream)
        assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"


def test_echo_best_of_and_bias(client: openai.OpenAI, live_engine: FakeAsyncEngine) -> None:
    (scored,) = client.completions.create(model=MODEL, prompt="Hey", echo=True, max_tokens=0, logprobs=1).choices
    assert scored.text == "Hey" and scored.logprobs.token_logprobs == [None, -0.25, -0.5]
    (best,) = client.completions.create(model=MODEL, prompt="x", best_of=3, seed=8, max_tokens=5).choices
    assert best.text == ANSWER.encode()[8:13].decode() and len(live_engine.seen) >= 3
    client.completions.create(model=MODEL, prompt="x", logit_bias={"65": -100}, max_tokens=1)
    assert live_engine.seen[-1][1].logit_bias == ((65, -100),)


def test_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(model=MODEL, prompt="x", seed=9, max_tokens=3, stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in stream] == [1, 2, 3, 3]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_openais_exceptions(client: openai.OpenAI, live_engine: FakeAsyncEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="at least 0, got -1") as bad:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=f"2000 tokens, but at most {MAX_MODEL_LEN - 1}") as long:
        client.completions.create(model=MODEL, prompt="x" * 2000)
    assert long.value.code == "context_length_exceeded"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid type: frob") as schema:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=form)
    assert schema.value.param == "response_format"
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.InternalServerError, match="NaN"):
        client.completions.create(model=MODEL, prompt="FAIL")
    with pytest.raises(openai.APIError, match="NaN"):
        list(client.completions.create(model=MODEL, prompt="LATE FAIL", stream=True))
    assert not live_engine.active


def test_queue_full(client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_engine, "max_requests", 0)
    with pytest.raises(openai.InternalServerError, match="queue is full") as full:
        client.completions.create(model=MODEL, prompt="x")
    assert full.value.status_code == 503 and full.value.response.headers["retry-after"] == "1"


def test_leaving_a_stream_aborts_it(client: openai.OpenAI, live_engine: FakeAsyncEngine) -> None:
    stream = client.completions.create(model=MODEL, prompt="SLOW", max_tokens=900, n=3, stream=True)
    next(iter(stream))
    assert len(live_engine.active) == 3
    stream.close()
    wait_until(lambda: not live_engine.active, "the requests of a closed stream still run")


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_first_token_aborts(live_url: str, live_engine: FakeAsyncEngine, stream: bool) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live_url}/v1/completions", json={"prompt": "STUCK", "stream": stream}, timeout=0.3)
    wait_until(lambda: not live_engine.active, "the request of a client that hung up still runs")


def test_half_a_request_hurts_nobody(live_url: str, client: openai.OpenAI) -> None:
    host, port = live_url.removeprefix("http://").split(":")
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nContent-Le", b"\x16\x03\x01 not http\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b'{"prompt"')  # and leaves in the middle of the body
    assert client.completions.create(model=MODEL, prompt="x").choices[0].text


async def test_many_clients_at_once(live_url: str, live_engine: FakeAsyncEngine) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0) as client:

        async def streamed(seed: int) -> str:
            stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=40, seed=seed, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def whole(seed: int) -> str:
            answer = await client.completions.create(model=MODEL, prompt="x", max_tokens=40, seed=seed)
            return answer.choices[0].text

        seeds = range(8, 12)  # past the two-byte letters, which a seed could split
        texts = await asyncio.gather(*(call(seed) for seed in seeds for call in (streamed, whole) for _ in range(8)))
    looped = ANSWER.encode() * 2
    assert texts == [looped[seed : seed + 40].decode() for seed in seeds for _ in range(16)]
    assert not live_engine.active
