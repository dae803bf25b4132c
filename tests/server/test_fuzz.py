"""Requests made from our own OpenAPI document, and beside it: none gets a 500, and every answer is as documented."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Message, Receive, Scope, Send
from tilestream.engine.async_engine import AsyncEngine
from tilestream.server.app import create_app
from tilestream.server.settings import ServerSettings

from .fakes import ByteTokenizer
from .hosts import check_idle, make_engine

STATUSES: dict[str, set[int]] = defaultdict(set)
ENGINE = make_engine(max_model_len=64, kv_cache_tokens=16 * 64)
APP = create_app(
    AsyncEngine(ENGINE), ByteTokenizer(), model_name="fake", max_model_len=64, settings=ServerSettings(access_log=False)
)


async def lasting_app(scope: Scope, receive: Receive, send: Send) -> None:
    """The app, whose engine outlives the many short lives that the fuzzer gives it."""
    if scope["type"] == "lifespan":
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})
        return

    async def counted_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            STATUSES[scope["path"]].add(message["status"])
        await send(message)

    await APP(scope, receive, counted_send)


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", lasting_app)
def no_failure_of_ours(ctx: object, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """A request that asks for a deadline may miss it."""
    is_late = response.status_code == 504 and isinstance(case.body, dict) and "timeout" in case.body
    assert response.status_code < 500 or is_late, response.text


GOOD = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [97]},
}
CHECKS = [
    no_failure_of_ours, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
PATHS = {
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/v1/engine/steps", "/tokenize",
    "/detokenize", "/health", "/health/ready", "/ready", "/metrics",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def idle_at_the_end() -> Iterator[None]:
    yield
    for path in GOOD:
        assert {200, 400} <= STATUSES[path], f"{path} was answered with {STATUSES[path]} alone: the fuzzer missed it"
    check_idle(ENGINE)
    APP.server.engine.shutdown()


@SCHEMA.parametrize()
@settings(max_examples=30, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_fuzz(case: schemathesis.Case) -> None:
    """As made; and with one field alone of those made, beside good ones: many odd fields at once are refused for one."""
    case.call_and_validate(checks=CHECKS)
    if case.path in GOOD and isinstance(case.body, dict) and case.body:
        names = sorted(case.body)
        name = names[len(repr(case.body)) % len(names)]
        case.body = GOOD[case.path] | {name: case.body[name]}
        case.call_and_validate(checks=CHECKS)


def test_the_document_has_every_path() -> None:
    assert set(APP.openapi()["paths"]) == PATHS
