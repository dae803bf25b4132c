"""Requests made from our own OpenAPI document, and beside it: none gets a 500, and every answer is as documented."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
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
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
PATHS = {
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/v1/engine/steps", "/tokenize",
    "/detokenize", "/health", "/health/ready", "/ready", "/metrics",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def idle_at_the_end() -> Iterator[None]:
    yield
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert {200, 400} <= STATUSES[path], f"{path} was answered with {STATUSES[path]} alone: the fuzzer missed it"
    check_idle(ENGINE)
    APP.server.engine.shutdown()


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_fuzz(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_the_document_has_every_path() -> None:
    assert set(APP.openapi()["paths"]) == PATHS
