"""Clients that stop, lie, flood and vanish, on real sockets. After each: the engine is empty, and others are served."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from .conftest import wait_until
from .hosts import check_idle, make_engine, served
from .test_bad_input import check_error

JSON = "Content-Type: application/json\r\n"


def dial(url: str, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(10)
    client.connect(("127.0.0.1", urlsplit(url).port))
    return client


def head(length: int | None, path: str = "/v1/completions", more: str = "") -> bytes:
    declared = "" if length is None else f"Content-Length: {length}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{JSON}{declared}{more}\r\n".encode()


def ask(prompt: str = "x", **fields: object) -> bytes:
    body = json.dumps({"prompt": prompt, "ignore_eos": True} | fields).encode()
    return head(len(body)) + body


def read_all(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def serves(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 4}, timeout=20)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4


# ---- Clients that stop.


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["nothing", "a word", "a header"]
)
def test_a_head_that_does_not_come(sent: bytes) -> None:
    with served(make_engine(), header_timeout_s=0.5) as url, closing(dial(url)) as client:
        begin_s = time.monotonic()
        client.sendall(sent)
        with pytest.raises(OSError):  # a byte now and then renews nothing
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.05)
        assert 0.3 < time.monotonic() - begin_s < 3
        serves(url)


def test_a_second_head_that_does_not_come() -> None:
    with served(make_engine(), header_timeout_s=0.5) as url, closing(dial(url)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        begin_s = time.monotonic()
        client.sendall(b"GET /hea")
        assert b"HTTP" not in read_all(client) and 0.3 < time.monotonic() - begin_s < 3


def test_an_answer_may_take_longer_than_a_head() -> None:
    with served(make_engine(step_s=0.02), header_timeout_s=0.2, body_timeout_s=0.2, keep_alive_s=1) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 40}, timeout=20)
        assert answer.json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("sent", [b"", b'{"prompt": "x'], ids=["nothing", "a part"])
def test_a_body_that_does_not_come(sent: bytes) -> None:
    with served(make_engine(), body_timeout_s=0.5) as url, closing(dial(url)) as client:
        client.sendall(head(100) + sent)
        answer = read_all(client)
        assert b"408" in answer and f"{len(sent)} bytes of it have".encode() in answer
        serves(url)


def test_five_hundred_idle_connections_stop_nobody() -> None:
    with served(make_engine(), header_timeout_s=2) as url:
        idle = [dial(url) for _ in range(500)]
        serves(url)
        begin_s = time.monotonic()
        assert all(read_all(client) == b"" for client in idle)
        assert time.monotonic() - begin_s < 5
        for client in idle:
            client.close()


# ---- Clients that do not read.


def test_a_client_that_does_not_read_its_answer() -> None:
    """It is given up, and its request with it; its neighbour's tokens come meanwhile."""
    engine = make_engine(step_s=0.002, kv_cache_tokens=1 << 17, max_model_len=1 << 16)
    with served(engine, write_timeout_s=1) as url, closing(dial(url, receive_buffer=4096)) as client:
        client.sendall(ask(stream=True, max_tokens=60_000, n=16, logprobs=20))
        wait_until(lambda: len(engine.scheduler.running) == 16, "not begun")
        begin_s = time.monotonic()
        serves(url)
        assert time.monotonic() - begin_s < 5
        wait_until(lambda: not engine.scheduler.running, "a dead reader is still written for", limit_s=30)
        assert engine.metrics.finished_requests["abort"] == 16


# ---- Clients that vanish.


@pytest.mark.parametrize("stream", [False, True])
def test_half_of_the_clients_leave_in_the_middle(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tilestream.access")
    engine = make_engine(step_s=0.005, token_budget=2048)
    num_clients = 100
    with served(engine) as url:

        async def one(client: httpx.AsyncClient, i: int) -> int:
            max_tokens = 1500 if i % 2 else 80
            body = {"prompt": f"client {i}", "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
            answer = await client.post("/v1/completions", json=body)
            return answer.text.count('"text"') if stream else answer.json()["usage"]["completion_tokens"]

        async def all_of_them() -> list[int]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
                tasks = [asyncio.ensure_future(one(client, i)) for i in range(num_clients)]
                while sum(engine.metrics.finished_requests.values()) + len(engine.scheduler.running) < num_clients:
                    await asyncio.sleep(0.01)
                for task in tasks[1::2]:
                    task.cancel()
                    await asyncio.sleep(random.uniform(0, 0.01))
                return await asyncio.gather(*tasks[::2])

        assert asyncio.run(all_of_them()) == [80] * (num_clients // 2)
        check_idle(engine)
        assert engine.metrics.finished_requests == {"stop": 0, "length": 50, "abort": 50, "error": 0}
        # A stream begins with its first token: who leaves before that is told of as one who waited for a whole answer.
        cut = caplog.text.count("/v1/completions 200 cut")
        assert caplog.text.count("/v1/completions 499") + cut == 50
        assert cut > 0 if stream else cut == 0


def test_a_client_that_leaves_inside_its_body(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with served(make_engine()) as url:
        with closing(dial(url)) as client:
            client.sendall(head(100) + b'{"prompt"')
        wait_until(lambda: "/v1/completions 499" in caplog.text, "the log does not tell that the client left")
        serves(url)
    assert "Traceback" not in caplog.text


def test_a_half_closed_connection_is_a_client_that_left() -> None:
    engine = make_engine(step_s=0.01)
    with served(engine) as url, closing(dial(url)) as client:
        client.sendall(ask(max_tokens=2000))
        wait_until(lambda: engine.scheduler.running, "not begun")
        client.shutdown(socket.SHUT_WR)
        check_idle(engine, limit_s=3)


# ---- Clients that lie and flood.


def test_a_body_of_100_mb() -> None:
    """It is refused in words, whether its length is told or not, and is never held in memory."""
    num_bytes, process = 100 * 2**20, psutil.Process()
    block = b" " * 2**20

    def pieces() -> Iterator[bytes]:
        for _ in range(num_bytes // len(block)):
            yield block

    with served(make_engine()) as url:
        serves(url)
        before = process.memory_info().rss
        for headers in ({"Content-Length": str(num_bytes)}, {}):
            headers |= {"Content-Type": "application/json"}
            answer = httpx.post(f"{url}/v1/completions", content=pieces(), headers=headers, timeout=30)
            check_error(answer, 413, None, str(4 * 2**20))
        assert process.memory_info().rss - before < 30 * 2**20
        serves(url)


def test_a_client_that_waits_to_be_told_to_send_is_told_at_once() -> None:
    with served(make_engine()) as url, closing(dial(url)) as client:
        begin_s = time.monotonic()
        client.sendall(head(10**9, more="Expect: 100-continue\r\n"))
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 413") and time.monotonic() - begin_s < 2


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**20 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 1000,
    ],
    ids=["tls", "version", "negative length", "two lengths", "long header", "path bytes", "zeros"],
)
def test_bytes_that_are_no_request(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with served(make_engine(), header_timeout_s=0.5, keep_alive_s=1) as url, closing(dial(url)) as client:
        client.sendall(sent)
        answer = read_all(client)
        assert answer == b"" or b" 40" in answer.split(b"\r\n")[0]
        serves(url)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b"\x80", '{"prompt": "x"}'.encode("utf-16")]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_bodies_that_are_not_utf8(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
    check_error(answer, 400, None, "not valid JSON", "utf-8")


def test_prompts_at_each_limit() -> None:
    limits = {"max_model_len": 256, "kv_cache_tokens": 320, "token_budget": 64}
    engine = make_engine(**limits)
    with served(engine) as url:

        def post(num_tokens: int, **fields: object) -> httpx.Response:
            body = {"prompt": [97] * num_tokens, "max_tokens": 1} | fields
            return httpx.post(f"{url}/v1/completions", json=body, timeout=20)

        for num_tokens in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 254, 255):
            answer = post(num_tokens)
            assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == num_tokens
        assert post(255, max_tokens=None).json()["usage"]["total_tokens"] == 256
        for num_tokens in (256, 257, 320, 321, 100_000):
            check_error(post(num_tokens), 400, "prompt", str(num_tokens), "255")
        check_idle(engine)


def test_ten_thousand_requests_in_the_queue() -> None:
    """They come over a few connections, 128 to a request; all are answered, one more is refused with a time to wait."""
    engine = make_engine(max_queued_requests=10_000, max_num_seqs=64, token_budget=512, kv_cache_tokens=1 << 16)
    gate, schedule = threading.Event(), engine.scheduler.schedule
    engine.scheduler.schedule = lambda: schedule() if gate.wait(0.01) else None
    sizes = [128] * 78 + [16]
    with served(engine) as url:

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
                body = {"prompt": "x", "max_tokens": 1, "ignore_eos": True}
                posts = [client.post("/v1/completions", json=body | {"n": n}) for n in sizes]
                tasks = [asyncio.ensure_future(post) for post in posts]
                while engine.num_waiting < 10_000:
                    await asyncio.sleep(0.05)
                refused = await client.post("/v1/completions", json=body | {"n": 128})
                ready = await client.get("/ready")
                gate.set()
                return [refused, ready, *await asyncio.gather(*tasks)]

        refused, ready, *answers = asyncio.run(flood())
        check_error(refused, 503, None, "queue is full")
        assert int(refused.headers["retry-after"]) >= 1 and ready.status_code == 200
        assert [len(answer.json()["choices"]) for answer in answers] == sizes
        check_idle(engine)
        assert engine.metrics.finished_requests["length"] == sum(sizes) == 10_000


@pytest.mark.parametrize("asks", [False, True], ids=["the server's limit", "its own"])
def test_a_request_that_takes_too_long(asks: bool) -> None:
    """504 for a whole answer, an event in a stream that has begun; in the queue as well as when it runs."""
    engine = make_engine(step_s=0.01, max_num_seqs=2)
    with served(engine, request_timeout_s=60 if asks else 0.5) as url:
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True} | ({"timeout": 0.5} if asks else {})

        async def all_of_them() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                bodies = [body, body | {"stream": True}, body | {"n": 2}]
                return await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))

        begin_s = time.monotonic()
        whole, stream, late = asyncio.run(all_of_them())
        assert time.monotonic() - begin_s < 5
        for answer in (whole, late):
            check_error(answer, 504, None, "deadline")
            assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert stream.status_code == 200 and "deadline_exceeded" in stream.text and stream.text.count('"text"') > 3
        check_idle(engine)


# ---- Memory.


def test_memory_is_flat_over_many_requests() -> None:
    """Whole answers, streams, refusals and clients that leave, in turns: what the process holds does not grow."""
    engine = make_engine()
    process = psutil.Process()
    with served(engine, access_log=False) as url:

        async def one(client: httpx.AsyncClient, i: int) -> None:
            body = {"prompt": f"{i} " * 20, "max_tokens": 8, "stream": i % 2 == 0}
            if i % 10 == 9:
                body["temperature"] = -1
            post = client.post("/v1/completions", json=body)
            if i % 10 == 8:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.post("/v1/completions", json=body | {"max_tokens": 1900}), 0.01)
            answer = await post
            assert answer.status_code == (400 if i % 10 == 9 else 200)

        async def many(count: int) -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                for begin in range(0, count, 20):
                    await asyncio.gather(*(one(client, i) for i in range(begin, begin + 20)))

        def resident_after(count: int) -> int:
            asyncio.run(many(count))
            check_idle(engine)
            gc.collect()
            return process.memory_info().rss

        resident = [resident_after(200) for _ in range(4)]
        assert (resident[-1] - resident[1]) / 400 < 1024, resident
        assert not re.search(r"error\": [1-9]", json.dumps(engine.metrics.finished_requests))
