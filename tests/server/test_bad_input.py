"""Every bad request gets OpenAI's error form, a message with the value and what is allowed, and hurts nobody."""

from __future__ import annotations

import asyncio
import functools

import httpx
import pytest

from .conftest import MAX_BODY_BYTES
from .fakes import FakeAsyncEngine
from .test_completions import events

CHAT = {"messages": [{"role": "user", "content": "x"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "frob"}}}},
}
DEEP_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": functools.reduce(lambda s, _: {"items": s}, range(700), {})},
}
CHOOSE_OTHER = {"type": "function", "function": {"name": "other"}}


def check_error(answer: httpx.Response, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": []}, "prompt", ["empty"]),
        ({"prompt": ["a", ""]}, "prompt", ["empty"]),
        ({"prompt": 7}, "prompt", ["7", "a string, a list of token ids"]),
        ({"prompt": ["a", 7]}, "prompt", ["['a', 7]"]),
        ({"prompt": [1, True]}, "prompt", ["True"]),
        ({"prompt": [1, 257]}, "prompt", ["257", "0..256"]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"prompt": [1, -1], "echo": True}, "prompt", ["prompt[1] is -1", "0..256"]),
        ({"prompt": [[2**64]], "echo": True}, "prompt", [str(2**64)]),
        ({"prompt": "x" * 1000}, "prompt", ["1000", "999"]),
        ({"prompt": ["x"] * 65, "n": 2}, "n", ["65", "128"]),
        ({"temperature": "hot"}, "temperature", ["number", "'hot'"]),
        ({"temperature": 10**400}, "temperature", ["1000"]),
        ({"temperature": -1}, "temperature", ["-1", "at least 0"]),
        ({"top_p": 2.0}, "top_p", ["2.0", "(0, 1]"]),
        ({"max_tokens": "5"}, "max_tokens", ["integer", "'5'"]),
        ({"max_tokens": 0}, "max_tokens", ["0", "at least 1", "echo"]),
        ({"max_tokens": -1, "echo": True, "logprobs": 0}, "max_tokens", ["-1", "at least 0"]),
        ({"min_tokens": 20}, "min_tokens", ["20", "at most max_tokens = 16"]),
        ({"n": 0}, "n", ["0", "1"]),
        ({"n": 129}, "n", ["129", "128"]),
        ({"seed": 2**63}, "seed", [str(2**63)]),
        ({"stop": 5}, "stop", ["a string or a list", "5"]),
        ({"stop": [""]}, "stop", ["empty"]),
        ({"stop": ["a"] * 17}, "stop", ["16"]),
        ({"logprobs": 21}, "logprobs", ["21", "20"]),
        ({"logprobs": True}, "logprobs", ["True"]),
        ({"stream": "yes"}, "stream", ["'yes'"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream=true"]),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", ["not supported"]),
        ({"echo": "yes"}, "echo", ["'yes'"]),
        ({"suffix": "end"}, "suffix", ["'end'", "not supported", "do not fill a gap"]),
        ({"best_of": 2, "n": 3}, "best_of", ["2", "at least n=3"]),
        ({"best_of": 2, "stream": True}, "best_of", ["cannot be streamed"]),
        ({"best_of": 129}, "best_of", ["129", "128"]),
        ({"prompt": ["x"] * 65, "best_of": 2}, "best_of", ["65", "128"]),
        ({"logit_bias": {"5": 101}}, "logit_bias", ["101", "[-100, 100]"]),
        ({"logit_bias": {"5": 10**400}}, "logit_bias", ["[-100, 100]"]),
        ({"logit_bias": {"5": "x"}}, "logit_bias", ["'x'", "numbers"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'", "token ids as strings"]),
        ({"logit_bias": [1]}, "logit_bias", ["an object", "[1]"]),
        ({"logit_bias": {"257": 1}}, "logit_bias", ["257", "0..256"]),
        ({"priority": "high"}, "priority", ["'high'"]),
        ({"priority": 2**40}, "priority", [str(2**40)]),
        ({"cache_salt": 1}, "cache_salt", ["string"]),
        ({"timeout": 0}, "timeout", ["greater than 0"]),
        ({"guided_json": 5}, "guided_json", ["5"]),
        ({"guided_json": {"type": "frob"}}, "guided_json", ["frob"]),
        ({"guided_json": "{"}, "guided_json", ["no valid JSON"]),
        ({"guided_regex": "(a"}, "guided_regex", ["(a", "unclosed group"]),
        ({"guided_choice": []}, "guided_choice", ["at least one"]),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", ["nothing"]),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", ["at most one"]),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", ["unclosed group"]),
        ({"structured_outputs": {"xml": "("}}, "structured_outputs.xml", ["not supported"]),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", ["not supported"]),
    ],
)
async def test_completion_field(client: httpx.AsyncClient, engine: FakeAsyncEngine, fields, param, words) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "x"} | fields)
    check_error(answer, 400, param, *words)
    assert not engine.active


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", ["at least one"]),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages", ["1006", "999"]),
        ({"messages": "hi"}, "messages", ["list"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["missing"]),
        ({"messages": [{"content": "x"}]}, "messages[0].role", ["missing"]),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", ["wizard", "'user'"]),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", ["a string"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", ["no images"]),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]", ["1"]),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", ["only"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            ["'['", "JSON object"],
        ),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio", ["not supp"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", ["the last message must be the user's"]),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs=true"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["21", "20"]),
        ({"tools": [{"type": "function"}]}, "tools[0].function", ["missing"]),
        ({"tools": [{"type": "code"}]}, "tools[0].type", ["'function'"]),
        ({"tools": [TOOL, TOOL]}, "tools", ["different names"]),
        ({"tool_choice": "required"}, "tool_choice", ["no tools"]),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", ["'maybe'", "'required'"]),
        ({"tools": [TOOL], "tool_choice": CHOOSE_OTHER}, "tool_choice", ["'other'", "'f'"]),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools", ["frob"]),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", ["combined with tools"]),
        ({"tools": [DEEP_TOOL], "tool_choice": "required"}, "tools", ["nested too deeply"]),
        ({"functions": [{}]}, "functions", ["use tools"]),
        ({"best_of": 2}, "best_of", ["/v1/completions"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["xml", "'text'"]),
        ({"response_format": {"type": "json_schema"}}, "response_format", ["json_schema is missing"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            ["missing"],
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            ["not"],
        ),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", ["tools"]),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", ["self"]),
    ],
)
async def test_chat_field(client: httpx.AsyncClient, fields, param, words) -> None:
    check_error(await client.post("/v1/chat/completions", json=CHAT | fields), 400, param, *words)


async def test_harmless_fields_are_ignored(client: httpx.AsyncClient) -> None:
    extra = {"user": "u", "store": False, "tools": [], "tool_choice": "none", "logit_bias": {}, "functions": None}
    assert (await client.post("/v1/chat/completions", json=CHAT | extra | {"max_tokens": 1})).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": ', ["not valid JSON"]),
        (b"", ["not valid JSON"]),
        (b"\xff\xfe\x00", ["not valid JSON"]),
        (b'{"prompt": "x", "temperature": NaN}', ["NaN"]),
        (b"[1, 2]", ["list", "object"]),
        (b'{"prompt": "half an emoji: \\uD83D"}', ["surrogates"]),
        (b"[" * 50_000, ["nested too deeply"]),
    ],
)
async def test_bad_json(client: httpx.AsyncClient, content: bytes, words: list[str]) -> None:
    answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    check_error(answer, 400, None, *words)


async def test_content_type(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    check_error(answer, 415, None, "text/plain", "application/json")


async def test_missing_prompt(client: httpx.AsyncClient) -> None:
    check_error(await client.post("/v1/completions", json={}), 400, "prompt", "missing")


async def test_unknown_model_path_and_method(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "gpt-99", "prompt": "x"})
    check_error(answer, 404, "model", "gpt-99", "fake-model")
    check_error(await client.post("/v1/embeddings", json={}), 404, None, "/v1/embeddings")
    check_error(await client.get("/v1/completions"), 405, None, "GET")


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_the_limit(client: httpx.AsyncClient, chunked: bool) -> None:
    async def pieces():
        for _ in range(3):
            yield b" " * (MAX_BODY_BYTES // 2)

    content = pieces() if chunked else b" " * (MAX_BODY_BYTES + 1)
    answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    check_error(answer, 413, None, str(MAX_BODY_BYTES))


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_full(client: httpx.AsyncClient, engine: FakeAsyncEngine, stream: bool) -> None:
    engine.max_requests = 2
    answer = await client.post("/v1/completions", json={"prompt": "x", "n": 3, "stream": stream})
    check_error(answer, 503, None, "queue is full")
    assert int(answer.headers["retry-after"]) >= 1
    assert not engine.active  # the two that had a place were given up
    assert (await client.post("/v1/completions", json={"prompt": "x", "n": 2, "stream": stream})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_hurt_nobody_else(client: httpx.AsyncClient, engine: FakeAsyncEngine, stream: bool) -> None:
    def post(prompt: str):
        return client.post("/v1/completions", json={"prompt": prompt, "stream": stream, "n": 2})

    good, failed, bug = await asyncio.gather(post("SLOW"), post("FAIL"), post("BUG"))
    assert good.status_code == 200
    check_error(failed, 500, None, "NaN")
    check_error(bug, 500, None, "log")
    assert "secret" not in bug.text
    assert not engine.active


async def test_failure_inside_a_stream_is_an_event(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "LATE FAIL", "stream": True})
    assert answer.status_code == 200
    *chunks, error = events(answer.text)
    assert len(chunks) >= 1 and "NaN" in error["error"]["message"]
    assert not engine.active


async def test_stopped_engine_is_503(client: httpx.AsyncClient, engine: FakeAsyncEngine, monkeypatch) -> None:
    from tilestream.engine.errors import EngineDeadError

    async def dead(*_):
        raise EngineDeadError("the engine has stopped")
        yield

    monkeypatch.setattr(engine, "stream", dead)
    check_error(await client.post("/v1/completions", json={"prompt": "x"}), 503, None, "stopped")
