"""Servers for the tests: in process (ASGI), and real ones on a free port of 127.0.0.1."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from tilestream.server.app import create_app
from tilestream.server.settings import ServerSettings

from .fakes import MAX_MODEL_LEN, ByteTokenizer, FakeAsyncEngine

MODEL = "fake-model"
MAX_BODY_BYTES = 100_000


def make_app(engine: FakeAsyncEngine, **limits: object):
    settings = ServerSettings(**{"max_body_bytes": MAX_BODY_BYTES} | limits)
    return create_app(engine, ByteTokenizer(), model_name=MODEL, max_model_len=MAX_MODEL_LEN, settings=settings)


@pytest.fixture
def engine() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture
async def client(engine: FakeAsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the app in this process."""
    transport = httpx.ASGITransport(make_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as made:
        yield made


@pytest.fixture(scope="module")
def live_engine() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture(scope="module")
def live_url(live_engine: FakeAsyncEngine) -> Iterator[str]:
    """Address of a uvicorn that runs in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(live_engine), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    assert not live_engine.is_running  # shut down with the server


def wait_until(condition, what: str, limit_s: float = 5.0) -> None:
    """Polls; fails with `what` when it has not become true."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)
