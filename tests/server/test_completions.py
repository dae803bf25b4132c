"""/v1/completions, /v1/chat/completions and the small endpoints, in process."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from tilestream.constraint import Constraint
from tilestream.engine.request import RequestOptions

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


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "xy", "seed": 10, "max_tokens": 4, "stream": True, "stream_options": options}
    *chunks, last = events((await client.post("/v1/completions", json=body)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert last["choices"] == [] and last["usage"] == chunks[-1]["usage"]


async def test_best_of_gives_the_likeliest(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    """The fake's logprobs fall with the seed."""
    body = {"prompt": ["a", "b"], "n": 2, "best_of": 4, "seed": 10, "max_tokens": 3}
    answer = (await client.post("/v1/completions", json=body)).json()
    best = [ANSWER[8:11], ANSWER[9:12]] * 2
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(best))
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert len(engine.seen) == 8 and answer["usage"]["completion_tokens"] == 24 and answer["usage"]["prompt_tokens"] == 2
    shown = (await client.post("/v1/completions", json=body | {"logprobs": 1, "seed": -8})).json()
    assert shown["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([-0.5 + 0.8] * 3)
    plain = (await client.post("/v1/completions", json={"prompt": "a", "best_of": 1, "max_tokens": 1})).json()
    assert len(plain["choices"]) == 1


@pytest.mark.parametrize("prompt", ["Hé", list("Hé".encode())])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: httpx.AsyncClient, prompt, stream: bool) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 2, "logprobs": 1, "n": 2, "stream": stream}
    answer = await client.post("/v1/completions", json=body)
    if stream:
        given = [choice for chunk in events(answer.text) for choice in chunk["choices"] if choice["index"] == 1]
        text = "".join(choice["text"] for choice in given)
        parts = [choice["logprobs"] for choice in given if choice["logprobs"]]
        logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    else:
        choice = answer.json()["choices"][1]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "HéGr"
    assert logprobs["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9", "G", "r"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"bytes:\\xc3": -0.25}]
    assert logprobs["text_offset"][:2] == [0, 1]


async def test_echo_without_logprobs_scores_nothing(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    choice = (await client.post("/v1/completions", json={"prompt": "Hi", "echo": True, "max_tokens": 1})).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("HiG", None)
    assert engine.seen[0][1].prompt_logprobs is None


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_scoring_generates_nothing(client: httpx.AsyncClient, logprobs: int | None) -> None:
    body = {"prompt": ["Hi", "x"], "echo": True, "max_tokens": 0, "logprobs": logprobs}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["Hi", "x"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    wanted = [None, None] if logprobs is None else [[None, -0.25], [None]]
    assert [choice["logprobs"] and choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == wanted
    assert answer["usage"]["completion_tokens"] == 0


async def test_scheduling_fields(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    begin_s = time.monotonic()
    body = {"prompt": "x", "max_tokens": 1, "priority": -3, "cache_salt": "mine", "timeout": 5}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    options = engine.seen_options[0]
    assert (options.priority, options.cache_salt) == (-3, "mine")
    assert begin_s + 5 <= options.deadline_s <= time.monotonic() + 5
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert engine.seen_options[1] == RequestOptions()
    late = await client.post("/v1/completions", json={"prompt": "TOO LATE", "timeout": 0.5})
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    assert late.json()["error"]["message"] == "the deadline has passed"


async def test_more_sampling_fields(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    body = {"prompt": "x", "logit_bias": {"5": -100, "7": 1.5}, "min_tokens": 3, "skip_special_tokens": False}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    _, params = engine.seen[0]
    assert params.logit_bias == ((5, -100), (7, 1.5)) and params.min_tokens == 3 and not params.skip_special_tokens


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint.json_object()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
            Constraint.json_schema(SCHEMA),
        ),
        ({"guided_json": SCHEMA}, Constraint.json_schema(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, Constraint.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, Constraint.regex("a+")),
        ({"guided_choice": ["a", "b"]}, Constraint.choice(["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, Constraint.grammar('start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint.json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, Constraint.json_object()),
        ({"structured_outputs": {"regex": "a"}}, Constraint.regex("a")),
        ({"structured_outputs": {"choice": ["a"]}}, Constraint.choice(["a"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint.grammar('start: "a"')),
    ],
)
async def test_structured_output_fields(client: httpx.AsyncClient, engine: FakeAsyncEngine, fields, constraint) -> None:
    for path, prompt in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer = await client.post(f"/v1/{path}", json=prompt | {"max_tokens": 1} | fields)
        assert answer.status_code == 200, answer.text
        assert engine.seen[-1][1].constraint == constraint


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
