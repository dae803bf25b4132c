"""Tool calls: every format, however the text is cut as it streams, whole and in chunks."""

from __future__ import annotations

import json
import random

import httpx
import openai
import pytest
from tilestream.server.tool_parser import NamedCallParser, ToolParser
from tilestream.server.tools import FORMATS, format_of

from .conftest import MODEL
from .fakes import ByteTokenizer, FakeAsyncEngine
from .test_completions import events

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "$defs": {"days": {"type": "integer"}},
        },
        "strict": True,
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
NAMES = {"weather", "time"}
PARIS = '{"city": "Pa\\"}r{is", "days": [1, {"a": "ü"}]}'
MESSAGES = [{"role": "user", "content": "Weather in Paris?"}]


def whole(deltas: list[dict]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and each call's name and arguments; checks the order of what a stream may send."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls) and call["type"] == "function" and len(call["id"]) == 9
                calls.append([call["function"]["name"], ""])
            assert call["index"] == len(calls) - 1
            calls[-1][1] += call["function"]["arguments"]
    return content, [tuple(call) for call in calls]


def parse(text: str, cuts: random.Random | None = None, **options) -> tuple[str, list[tuple[str, str]]]:
    parser, deltas = ToolParser(NAMES, **options), []
    while text:
        size = len(text) if cuts is None else cuts.choice((1, 1, 2, 3, 7))
        deltas += parser.feed(text[:size])
        text = text[size:]
    return whole(deltas + parser.finish())


HERMES = {"begin": "<tool_call>", "end": "</tool_call>"}
MISTRAL = {"begin": "[TOOL_CALLS]"}
LLAMA = {"begin": "<|python_tag|>", "bare": True}
FORCED = {"bare": True}
CALL = f'{{"name": "weather", "arguments": {PARIS}}}'
OTHER = '{"name": "time", "arguments": {}}'
WEATHER_CALL, TIME_CALL = ("weather", PARIS), ("time", "{}")
CASES = [
    (HERMES, "Just text < with <tool_ in it", "Just text < with <tool_ in it", []),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER_CALL]),
    (
        HERMES,
        f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{OTHER}</tool_call>\n",
        "Let me see.\n",
        [WEATHER_CALL, TIME_CALL],
    ),
    (HERMES, f"<tool_call>{CALL}</tool_call> Done.", "Done.", [WEATHER_CALL]),
    (HERMES, f"<tool_call>{CALL}", "", [WEATHER_CALL]),
    (HERMES, f"<tool_call>{OTHER[:-1]}", "", [TIME_CALL]),
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [TIME_CALL]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [("time", '{"a": 2}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": {}, "id": "x}"}</tool_call>', "", [TIME_CALL]),
    (HERMES, '<tool_call>{"name": "no"', '<tool_call>{"name": "no"', []),
    (
        HERMES,
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [],
    ),
    (
        HERMES,
        '<tool_call>{"name": ["a"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["a"], "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, f"<tool_call>{{oh}}</tool_call><tool_call>{OTHER}</tool_call>", "<tool_call>{oh}</tool_call>", [TIME_CALL]),
    (HERMES, "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    (
        HERMES,
        '<tool_call>{"name": "\\q", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\q", "arguments": {}}</tool_call>',
        [],
    ),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [WEATHER_CALL, TIME_CALL]),
    (MISTRAL, f"[TOOL_CALLS][{OTHER}]", "", [TIME_CALL]),
    (MISTRAL, "a list [1, 2] and [TOOL", "a list [1, 2] and [TOOL", []),
    (LLAMA, CALL.replace("arguments", "parameters"), "", [WEATHER_CALL]),
    (LLAMA, f"<|python_tag|>{CALL}; {OTHER}", "", [WEATHER_CALL, TIME_CALL]),
    (LLAMA, " [a text with {braces}]", " [a text with {braces}]", []),
    (LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (LLAMA, "{not json", "{not json", []),
    (FORCED, f"[{CALL}, {OTHER}]", "", [WEATHER_CALL, TIME_CALL]),
    (FORCED, '[{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    (FORCED | {"max_calls": 1}, f"[{CALL}, {OTHER}]", "", [WEATHER_CALL]),
]


@pytest.mark.parametrize(("options", "text", "content", "calls"), CASES)
def test_parser(options: dict, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(text, **options) == (content, calls)
    for seed in range(20):
        assert parse(text, random.Random(seed), **options) == (content, calls)


def test_arguments_stream_as_they_come() -> None:
    parser = ToolParser(NAMES, **HERMES)
    calls = [
        call
        for char in f"Hm. <tool_call>{CALL}</tool_call>"
        for delta in parser.feed(char)
        for call in delta.get("tool_calls", ())
    ]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert [call["function"]["arguments"] for call in calls[1:]] == list(PARIS)


def test_named_function() -> None:
    parser = NamedCallParser("time")
    deltas = [*parser.feed('{"a"'), *parser.feed(""), *parser.feed(": 1}"), *parser.finish()]
    assert whole(deltas) == ("", [("time", '{"a": 1}')])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}...<tool_call></tool_call>{% endif %}", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3"),
        ("<tool_call>\n<function=example>", None),  # Qwen3-Coder's XML
        ("[TOOL_CALLS]name[ARGS]", None),  # Mistral's newer form
        ("<|im_start|>{{ role }}", None),
        (None, None),
    ],
)
def test_formats_are_known_by_the_template(template: str | None, name: str | None) -> None:
    found = format_of(template)
    assert (found and found.name) == name
    assert len({f.name for f in FORMATS}) == len(FORMATS)


def fields(**more: object) -> dict:
    return {"model": MODEL, "messages": MESSAGES, "tools": [WEATHER, TIME]} | more


@pytest.fixture
def openai_client(live_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_url}/v1", api_key="unused", max_retries=0)


def test_auto(openai_client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_engine, "answer", f"I look.\n<tool_call>\n{CALL}\n</tool_call>")
    (choice,) = openai_client.chat.completions.create(**fields()).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look.\n"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", json.loads(PARIS))
    prompt, params = live_engine.seen[-1]
    shown = bytes(prompt).decode()
    assert '[tools=[{"type": "function", "function": {"name": "weather", "description": ' in shown and "strict" not in shown
    assert params.constraint is None and not params.skip_special_tokens


def test_stream(openai_client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_engine, "answer", f"<tool_call>{CALL}</tool_call><tool_call>{OTHER}</tool_call>")
    with openai_client.chat.completions.stream(**fields()) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and not final.message.content
    assert [(c.function.name, c.function.arguments) for c in final.message.tool_calls] == [WEATHER_CALL, TIME_CALL]


def test_one_call_at_a_time(openai_client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_engine, "answer", f"<tool_call>{OTHER}</tool_call><tool_call>{CALL}</tool_call>")
    (choice,) = openai_client.chat.completions.create(**fields(parallel_tool_calls=False)).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["time"]


def test_plain_answer_and_cut_call(
    openai_client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_engine, "answer", "It rains.")
    (choice,) = openai_client.chat.completions.create(**fields()).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "It rains.", None)
    monkeypatch.setattr(live_engine, "answer", f"<tool_call>{CALL}</tool_call>")
    (choice,) = openai_client.chat.completions.create(**fields(max_tokens=60)).choices
    assert choice.finish_reason == "length"
    assert PARIS.startswith(choice.message.tool_calls[0].function.arguments)


def test_logprobs_stay_beside_calls(
    openai_client: openai.OpenAI, live_engine: FakeAsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = f"<tool_call>{CALL}</tool_call>"
    monkeypatch.setattr(live_engine, "answer", answer)
    chunks = list(openai_client.chat.completions.create(**fields(logprobs=True, stream=True)))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert sum(len(part.content) for part in parts) == len(answer.encode())


async def test_none_hides_the_tools(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    engine.answer = f"<tool_call>{OTHER}</tool_call>"
    body = (await client.post("/v1/chat/completions", json=fields(tool_choice="none"))).json()
    assert body["choices"][0]["message"]["content"] == engine.answer
    assert "tools=" not in bytes(engine.seen[0][0]).decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_required_forces_json(client: httpx.AsyncClient, engine: FakeAsyncEngine, stream: bool) -> None:
    engine.answer = f"[{CALL}, {OTHER}]"
    answer = await client.post("/v1/chat/completions", json=fields(tool_choice="required", stream=stream))
    if stream:
        choices = [choice for chunk in events(answer.text) for choice in chunk["choices"]]
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert whole([choice["delta"] for choice in choices]) == ("", [WEATHER_CALL, TIME_CALL])
    else:
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [
            WEATHER_CALL,
            TIME_CALL,
        ]
    schema = json.loads(engine.seen[0][1].constraint.text)
    assert schema["$defs"]["tool0"]["properties"]["days"] == {"$ref": "#/$defs/tool0/$defs/days"}
    assert "maxItems" not in schema


async def test_named_forces_arguments(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    engine.answer = '{"city": "Rome"}'
    choice = {"type": "function", "function": {"name": "weather"}}
    body = (await client.post("/v1/chat/completions", json=fields(tool_choice=choice))).json()
    (given,) = body["choices"]
    assert given["finish_reason"] == "stop"  # as OpenAI: the choice was not the model's
    assert given["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert json.loads(engine.seen[0][1].constraint.text)["required"] == ["city"]


async def test_history_of_calls(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "time", "arguments": '{"zone": 1}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "12:00"},
    ]
    answer = await client.post("/v1/chat/completions", json=fields(messages=history))
    assert answer.status_code == 200, answer.text
    shown = bytes(engine.seen[0][0]).decode()
    assert '<assistant>[{"id": "abcdefghi", "type": "function", "function": {"name": "time", "arguments": {"zone": 1}}}]' in shown
    assert shown.endswith("<tool>12:00")


class PlainTokenizer(ByteTokenizer):
    chat_template = "no tools here"


async def test_a_template_without_tools(engine: FakeAsyncEngine) -> None:
    from tilestream.server.app import create_app

    app = create_app(engine, PlainTokenizer(), model_name=MODEL, max_model_len=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        refused = await client.post("/v1/chat/completions", json=fields())
        assert refused.status_code == 400 and "teaches no tool calls" in refused.json()["error"]["message"]
        engine.answer = f"[{OTHER}]"
        forced = (await client.post("/v1/chat/completions", json=fields(tool_choice="required"))).json()
        calls = forced["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["time"]
        shown = bytes(engine.seen[-1][0]).decode()
        assert shown.startswith('<system>You can call these functions: [{"name": "weather"')
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "12:00"}
        system = {"role": "system", "content": "Be brief."}
        more = fields(
            messages=[system, *MESSAGES, answer, result],
            tools=[TIME],
            tool_choice={"type": "function", "function": {"name": "time"}},
        )
        engine.answer = "{}"
        assert (await client.post("/v1/chat/completions", json=more)).status_code == 200
        shown = bytes(engine.seen[-1][0]).decode()
        assert (
            shown.startswith("<system>Be brief.\n\nYou can call")
            and '<assistant>[{"name": "time", "arguments": {}}]<tool>12:00' in shown
        )
