"""/v1/completions, /v1/chat/completions and the small endpoints, in process."""

from __future__ import annotations

import json

import httpx
import pytest

from .conftest import MODEL
from .fakes import ANSWER, MAX_MODEL_LEN, FakeAsyncEngine


def events(text: str) -> list[dict]:
    """The payloads of a stream, which must end with [DONE]."""
    lines = text.strip().split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_completion(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 9})
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion" and body["model"] == MODEL and body["id"].startswith("cmpl-")
    text = ANSWER.encode()[:9].decode()
    assert body["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_completion_defaults_are_openais(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "x"})
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    (_, completion), (_, chat) = engine.seen
    assert completion.max_tokens == 16 and completion.temperature == 1.0
    assert chat.max_tokens is None and chat.temperature == 1.0


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[97], [98, 256]], [[97], [98, 256]]),
    ],
)
async def test_prompt_forms(client: httpx.AsyncClient, engine: FakeAsyncEngine, prompt, wanted) -> None:
    answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert answer.status_code == 200
    assert [ids for ids, _ in engine.seen] == wanted
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, wanted))


async def test_n_takes_seeds_in_a_row_and_numbers_choices(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    answer = await client.post(
        "/v1/completions", json={"prompt": ["a", "bb"], "n": 2, "seed": 10, "max_tokens": 3, "temperature": 0.5}
    )
    body = answer.json()
    assert [params.seed for _, params in engine.seen] == [10, 11, 10, 11]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [ANSWER[8:11], ANSWER[9:12]] * 2
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    fields = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 3,
        "ignore_eos": True,
    }
    answer = await client.post("/v1/completions", json={"prompt": "x", "stop": ["zz", "y"], "user": "me"} | fields)
    assert answer.status_code == 200
    _, params = engine.seen[0]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.stop == ("zz", "y")


@pytest.mark.parametrize("stop", ["quick", ["nothing", "quick"]])
async def test_stop(client: httpx.AsyncClient, stop) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 40, "stop": stop})
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop" and "quick" not in choice["text"]


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, "logprobs": 2})
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"G": -0.5, "H": -1.5}
    assert logprobs["text_offset"][:3] == [0, 1, 2]


async def test_chat_completion(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "d"},
    ]
    answer = await client.post(
        "/v1/chat/completions",
        json={"messages": messages, "max_completion_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}},
    )
    body = answer.json()
    assert answer.status_code == 200, body
    prompt = "<system>be brief<user>a\nb<assistant>c<user>d[enable_thinking=False]"
    assert bytes(engine.seen[0][0]).decode() == prompt
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Gr", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    content = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
    top = [{"token": "G", "logprob": -0.5, "bytes": [71]}, {"token": "H", "logprob": -1.5, "bytes": [72]}]
    assert content == [{"token": "G", "logprob": -0.5, "bytes": [71], "top_logprobs": top}]


@pytest.mark.parametrize("include_usage", [False, True])
async def test_completion_stream(client: httpx.AsyncClient, include_usage: bool) -> None:
    body = {"prompt": "x", "max_tokens": 12, "stream": True, "stream_options": {"include_usage": include_usage}}
    answer = await client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    usage = chunks.pop() if include_usage else None
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER.encode()[:12].decode()
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(("usage" in chunk) == include_usage for chunk in chunks)
    if usage is not None:
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12


async def test_chat_stream_of_two_choices(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "n": 2, "seed": 20, "stream": True}
    chunks = events((await client.post("/v1/chat/completions", json=body)).text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "length"
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == ANSWER.encode()[20 + index : 26 + index].decode()


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    card = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed == {"object": "list", "data": [card]}
    assert card["id"] == MODEL and card["max_model_len"] == MAX_MODEL_LEN
    assert (await client.get("/v1/models/org/other")).status_code == 404


async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    assert (await client.get("/health")).status_code == 200
    engine.shutdown()
    assert (await client.get("/health")).status_code == 503


async def test_metrics(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
    engine.metrics.num_requests_waiting = 3
    engine.metrics.prefix_cache_hits = 7
    lines = (await client.get("/metrics")).text.splitlines()
    label = f'{{model_name="{MODEL}"}}'
    for line in (
        f"tilestream:num_requests_waiting{label} 3.0",
        f"tilestream:prefix_cache_hits_total{label} 7.0",
        f"tilestream:generation_tokens_total{label} 5.0",
        f"tilestream:time_to_first_token_seconds_count{label} 1.0",
        f"tilestream:inter_token_latency_seconds_count{label} 4.0",
        f"tilestream:e2e_request_latency_seconds_count{label} 1.0",
        f'tilestream:request_success_total{{finished_reason="length",model_name="{MODEL}"}} 1.0',
    ):
        assert line in lines
    names = {line.split("{")[0] for line in lines if not line.startswith("#")}
    assert names >= {
        f"tilestream:{name}"
        for name in (
            "num_requests_running",
            "kv_cache_usage_perc",
            "num_preemptions_total",
            "prefix_cache_queries_total",
            "prompt_tokens_total",
        )
    }


async def test_docs_show_the_fields(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "max_tokens", "temperature", "stream"} <= body["properties"].keys()
