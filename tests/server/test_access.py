"""Who may come in, under which name, and what is said of it: ids, keys, the log, CORS, the drain, bodies that dawdle."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from pathlib import Path

import httpx
import pytest
from tilestream.engine.errors import QueueFullError
from tilestream.engine.metrics import StepRecord
from tilestream.server.app import create_app
from tilestream.server.settings import ApiKeys, ServerSettings, read_api_keys

from .conftest import make_app
from .fakes import MAX_MODEL_LEN, ByteTokenizer, FakeAsyncEngine
from .test_bad_input import check_error

ASK = {"prompt": "top secret words", "max_tokens": 3}
OPEN = ("/", "/health", "/health/ready", "/ready", "/metrics", "/docs", "/openapi.json")


def connect(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://server")


# ---- Request ids.


@pytest.mark.parametrize("given", ["abc", "a1b2-c3.d4:e5/f6", "x" * 128])
async def test_the_clients_id_is_echoed(client: httpx.AsyncClient, given: str) -> None:
    for path in ("/health", "/v1/models/none"):
        answer = await client.get(path, headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] == given
    assert answer.status_code == 404 and answer.json()["request_id"] == given


@pytest.mark.parametrize("given", [None, "", "two words", "x" * 129, "é", "a\tb", "a;b"])
async def test_an_id_is_made_for_who_has_no_plain_one(client: httpx.AsyncClient, given: str | None) -> None:
    answers = [
        await client.get("/health", headers=[] if given is None else [("X-Request-Id", given.encode())]) for _ in range(2)
    ]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", made) for made in ids)


async def test_failures_of_ours_have_the_id(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    for stream in (False, True):
        answer = await client.post("/v1/completions", json={"prompt": "BUG", "stream": stream}, headers={"X-Request-Id": "7"})
        assert answer.status_code == 500 and answer.json()["request_id"] == "7" == answer.headers["x-request-id"]
    late = await client.post("/v1/completions", json={"prompt": "LATE FAIL", "stream": True}, headers={"X-Request-Id": "8"})
    assert '"request_id":"8"' in late.text
    engine.metrics = None  # a bug in a route
    async with connect(make_app(engine)) as broken:
        answer = await broken.get("/v1/engine/steps", headers={"X-Request-Id": "9"})
    assert answer.status_code == 500 and answer.json()["request_id"] == "9" == answer.headers["x-request-id"]


# ---- Keys.


async def test_only_keys_that_are_good_come_in(engine: FakeAsyncEngine) -> None:
    async with connect(make_app(engine, api_keys=ApiKeys(["key-a", "key-b"]))) as client:

        async def post(authorization: str | None) -> httpx.Response:
            headers = [] if authorization is None else [(b"Authorization", authorization.encode())]
            return await client.post("/v1/completions", json=ASK, headers=headers)

        for wrong in (None, "", "key-a", "Basic key-a", "Bearer", "Bearer key-", "Bearer key-aa", "Bearer KEY-A", "Bearer é"):
            answer = await post(wrong)
            check_error(answer, 401, None, "Authorization: Bearer KEY")
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert not engine.seen
        for right in ("Bearer key-a", "bearer key-b", "Bearer  key-a "):
            assert (await post(right)).status_code == 200
        tenants = [options.tenant for options in engine.seen_options]
        assert tenants[0] == tenants[2] != tenants[1] and all(re.fullmatch("[0-9a-f]{12}", name) for name in tenants)
        for path in OPEN:
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/v1/engine/steps", "/v1/models/x", "/health/", "/no"):
            assert (await client.get(path)).status_code == 401, path
        for path in ("/tokenize", "/detokenize", "/v1/chat/completions"):
            assert (await client.post(path, json={})).status_code == 401, path


async def test_without_keys_everybody_comes_in(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    assert (await client.post("/v1/completions", json=ASK, headers={"Authorization": "Bearer any"})).status_code == 200
    assert engine.seen_options[0].tenant == ""


def test_keys_of_options_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the web shop\none\n\n  two  \n")
    keys = read_api_keys(["zero"], file)
    assert all(keys.tenant(key) for key in ("zero", "one", "two"))
    assert keys.tenant("# of the web shop") is None and keys.tenant("") is None
    assert not read_api_keys([], None)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="keys holds no API key"):
        read_api_keys([], file)
    for wrong in ("", " x", "x\n", "schlüssel"):
        with pytest.raises(ValueError, match="printable ASCII"):
            ApiKeys([wrong])


# ---- The access log.


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tilestream.access"]


async def test_one_line_per_request_without_its_text(engine: FakeAsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    key = {"Authorization": "Bearer hush-hush", "X-Request-Id": "id-1"}
    async with connect(make_app(engine, api_keys=ApiKeys(["hush-hush"]))) as client:
        await client.post("/v1/completions?token=query-secret", json=ASK | {"n": 2}, headers=key)
        await client.post("/v1/completions", json=ASK | {"stream": True}, headers=key)
        await client.get("/a%0Ab" + "c" * 300, headers=key)
        await client.get("/health")
    completion, stream, missing, health = lines(caplog)
    tenant = ApiKeys(["hush-hush"]).tenant("hush-hush")
    pattern = rf"POST /v1/completions 200 \d+\.\d ms tokens 16 in 6 out tenant={tenant} id=id-1"
    assert re.fullmatch(pattern, completion), completion
    assert "tokens 16 in 3 out" in stream
    assert missing.startswith("GET /a%0Abccc") and " 404 " in missing and len(missing) < 300
    assert re.fullmatch(r"GET /health 200 \d+\.\d ms tenant=- id=[0-9a-f]{32}", health), health
    for word in ("secret", "hush", "Grüße"):
        assert not any(word in record.getMessage() for record in caplog.records if record.name.startswith("tilestream"))


async def test_no_access_log(engine: FakeAsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with connect(make_app(engine, access_log=False)) as client:
        await client.get("/health")
    assert lines(caplog) == []


# ---- CORS.


async def test_cors_is_off_by_default(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    check_error(await client.options("/v1/completions", headers=asked), 405, None, "OPTIONS")


async def test_cors_of_a_named_origin(engine: FakeAsyncEngine) -> None:
    app = make_app(engine, cors_origins=("https://example.org",), api_keys=ApiKeys(["k"]))
    async with connect(app) as client:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, wanted in (("https://example.org", "https://example.org"), ("https://example.com", None)):
            answer = await client.options("/v1/completions", headers=asked | {"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == wanted
            refused = await client.post("/v1/completions", json=ASK, headers={"Origin": origin})
            assert refused.status_code == 401 and refused.headers.get("access-control-allow-origin") == wanted


# ---- Draining, deadlines, a full queue.


async def test_draining(engine: FakeAsyncEngine) -> None:
    app = make_app(engine)
    async with connect(app) as client:
        assert (await client.get("/ready")).json() == {"status": "ok"}
        app.server.traffic.is_draining = True
        for path in ("/ready", "/health/ready"):
            check_error(await client.get(path), 503, None, "stopping")
        answer = await client.post("/v1/completions", json=ASK)
        check_error(answer, 503, None, "stopping")
        assert answer.headers["retry-after"] == "1" and answer.headers["connection"] == "close"
        health = await client.get("/health")
        assert health.status_code == 200 and health.headers["connection"] == "close"
        engine.is_running = False
        check_error(await client.get("/health"), 503, None, "engine has stopped")


@pytest.mark.parametrize("limit_s", [None, 7.5])
async def test_the_servers_deadline_reaches_the_engine(engine: FakeAsyncEngine, limit_s: float | None) -> None:
    async with connect(make_app(engine, request_timeout_s=limit_s)) as client:
        before_s = time.monotonic()
        await client.post("/v1/completions", json=ASK)
    (options,) = engine.seen_options
    if limit_s is None:
        assert options.deadline_s is None
    else:
        assert before_s + limit_s <= options.deadline_s <= time.monotonic() + limit_s


async def test_retry_after_is_the_engines_estimate(client: httpx.AsyncClient, engine: FakeAsyncEngine, monkeypatch) -> None:
    async def full(*_):
        raise QueueFullError(9, 9, retry_after_s=17)
        yield

    monkeypatch.setattr(engine, "stream", full)
    answer = await client.post("/v1/completions", json=ASK)
    check_error(answer, 503, None, "queue is full")
    assert answer.headers["retry-after"] == "17"


# ---- Bodies.


async def test_a_body_that_dawdles(engine: FakeAsyncEngine) -> None:
    async def drip():
        for _ in range(20):
            yield b" "
            await asyncio.sleep(0.05)

    async with connect(make_app(engine, body_timeout_s=0.2)) as client:
        begin_s = time.monotonic()
        answer = await client.post("/v1/completions", content=drip(), headers={"Content-Type": "application/json"})
        check_error(answer, 408, None, "0.2 s", "bytes")
        assert answer.headers["connection"] == "close" and time.monotonic() - begin_s < 3
        slow_answer = await client.post("/v1/completions", json={"prompt": "SLOW", "max_tokens": 20})
        assert slow_answer.status_code == 200  # the limit is the body's, not the answer's


# ---- /tokenize, /detokenize, /v1/engine/steps.


async def test_tokens_there_and_back(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})).json()
    assert answer == {
        "count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": [97, 195, 169], "token_strs": ["a", "\ufffd", "\ufffd"],
    }  # fmt: skip
    assert (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": "aé"}
    assert (await client.post("/detokenize", json={"tokens": [195]})).json() == {"prompt": "\ufffd"}
    messages = [{"role": "user", "content": "hi"}]
    chat = (await client.post("/tokenize", json={"messages": messages})).json()
    assert bytes(chat["tokens"]).decode() == "<user>hi[add_generation_prompt=True]" and chat["token_strs"] is None
    assert (await client.post("/detokenize", json={"tokens": [104, 105, 256]})).json() == {"prompt": "hi<end>"}


async def test_tokens_of_a_chat_with_tools(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    tokens = (await client.post("/tokenize", json=chat)).json()["tokens"]
    assert bytes(tokens).decode() == f"[tools={json.dumps([tool])}]<user>hi[add_generation_prompt=True]"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", ["prompt or messages"]),
        ("/tokenize", {"prompt": 5}, "prompt", ["string", "5"]),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt", ["not both"]),
        ("/tokenize", {"messages": []}, "messages", ["at least one"]),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", ["the user's"]),
        ("/tokenize", {"prompt": "x", "wat": 1}, "wat", ["not supported"]),
        ("/detokenize", {}, "tokens", ["missing"]),
        ("/detokenize", {"tokens": [1, 257]}, "tokens", ["tokens[1] is 257", "0..256"]),
        ("/detokenize", {"tokens": [-1]}, "tokens", ["-1"]),
        ("/detokenize", {"tokens": [True]}, "tokens[0]", ["integer"]),
    ],
)
async def test_bad_tokens(client: httpx.AsyncClient, path: str, body: dict, param: str, words: list[str]) -> None:
    check_error(await client.post(path, json=body), 400, param, *words)


async def test_steps(client: httpx.AsyncClient, engine: FakeAsyncEngine) -> None:
    empty = (await client.get("/v1/engine/steps")).json()
    assert empty["steps"] == [] and empty["next"] == 0 and empty["engine"]["model"] == "fake-model"
    for i in range(3):
        step = StepRecord(
            index=i, begin_s=i, end_s=i + 0.5, prefill_tokens=10, decode_tokens=i, budget_tokens=64, num_running=1,
            num_waiting=0, kv_cache_usage=0.25,
        )  # fmt: skip
        engine.steps.add(step)
    answer = (await client.get("/v1/engine/steps?since=1")).json()
    assert [step["step"] for step in answer["steps"]] == [1, 2] and answer["next"] == 3
    assert answer["steps"][1] == {
        "step": 2, "begin_s": 2, "seconds": 0.5, "prefill_tokens": 10, "decode_tokens": 2, "budget_tokens": 64,
        "num_running": 1, "num_waiting": 0, "kv_cache_usage": 0.25,
    }  # fmt: skip
    for since in (3, 5000):  # 5000: of a server before this one
        answer = (await client.get(f"/v1/engine/steps?since={since}")).json()
        assert answer["steps"] == [] and answer["next"] == 3
    for wrong in ("-1", "x"):
        check_error(await client.get(f"/v1/engine/steps?since={wrong}"), 400, "since", wrong)


def test_settings_have_the_documented_defaults() -> None:
    app = create_app(FakeAsyncEngine(), ByteTokenizer(), model_name="m", max_model_len=8)
    assert app.server.settings == ServerSettings(api_keys=app.server.settings.api_keys)
    assert not app.server.settings.api_keys and app.server.settings.cors_origins == ()
