"""Stop signals: not ready at once, running answers end, new ones are refused, the process exits with 0."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tilestream.server.run import bind

SCRIPT = """
import sys
from server.fakes import ByteTokenizer
from server.hosts import make_engine
from tilestream.engine.async_engine import AsyncEngine
from tilestream.server.run import bind, serve
from tilestream.server.settings import ServerSettings
engine = make_engine(step_s=0.02)
settings = ServerSettings(drain_timeout_s=float(sys.argv[1]))
serve(AsyncEngine(engine), ByteTokenizer(), bind("127.0.0.1", 0), model_name="m", max_model_len=2048, settings=settings)
assert not engine.has_work() and not engine.scheduler.pool.num_owned_pages, "requests are left in the engine"
"""
Server = tuple[subprocess.Popen[str], str]


@pytest.fixture
def start() -> Iterator[Callable[[float], Server]]:
    """Starts a server process with a drain limit; gives it and its address."""
    processes = []

    def start_one(drain_timeout_s: float) -> Server:
        command = [sys.executable, "-c", SCRIPT, str(drain_timeout_s)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
        processes.append(process)
        for line in process.stderr:
            if ready := re.search(r"Ready: (http://\S+)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # the pipe must not fill up
                return process, ready[1]
        pytest.fail("the server did not get ready")

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_answers_end(start: Callable[[float], Server], number: signal.Signals) -> None:
    process, url = start(20)
    body = {"prompt": "x", "max_tokens": 30, "stream": True, "ignore_eos": True}
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line and not text:
                process.send_signal(number)
            text += line
    assert text.endswith("data: [DONE]") and text.count('"text"') == 30
    assert process.wait(10) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/v1/models")


def test_under_load(start: Callable[[float], Server]) -> None:
    """Of 40 clients, streaming or not, every one that was let in gets its whole answer."""
    process, url = start(20)

    async def one(client: httpx.AsyncClient, i: int) -> int:
        body = {"prompt": f"client {i}", "max_tokens": 40, "ignore_eos": True, "stream": i % 2 == 0}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.text.count('"text"') if body["stream"] else answer.json()["usage"]["completion_tokens"]

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            tasks = [asyncio.ensure_future(one(client, i)) for i in range(40)]
            while 'num_requests_running{model_name="m"} 40.0' not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            begin_s = time.monotonic()
            while (await client.get("/ready")).status_code == 200:
                assert time.monotonic() - begin_s < 1, "a stopping server says that it is ready"
            assert (await client.get("/health")).status_code == 200
            late = await client.post("/v1/completions", json={"prompt": "late"})
            assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
            return await asyncio.gather(*tasks)

    assert asyncio.run(all_of_them()) == [40] * 40
    assert process.wait(10) == 0


@pytest.mark.parametrize("again", [False, True])
def test_answers_that_do_not_end_are_ended(start: Callable[[float], Server], again: bool) -> None:
    """By the limit, or by a second signal; their clients are told."""
    process, url = start(60 if again else 0.5)
    body = {"prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    text, begin_s = "", 0.0
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line and not text:
                begin_s = time.monotonic()
                process.send_signal(signal.SIGTERM)
                if again:
                    time.sleep(0.3)
                    process.send_signal(signal.SIGTERM)
            text += line
    assert text.endswith("data: [DONE]") and "the server is stopping" in text
    assert process.wait(10) == 0
    assert time.monotonic() - begin_s < 5


def test_an_idle_server_stops_at_once(start: Callable[[float], Server]) -> None:
    process, url = start(60)
    with httpx.Client(base_url=url) as client:  # its kept connection is nothing to wait for
        client.get("/health")
        begin_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0 and time.monotonic() - begin_s < 3


def test_a_taken_port_is_told_in_words() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            bind("127.0.0.1", port)
