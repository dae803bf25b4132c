"""Stop signals: running answers end, new clients are refused, the process exits with 0."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tilestream.server.run import bind

SCRIPT = """
from server.fakes import MAX_MODEL_LEN, ByteTokenizer, FakeAsyncEngine
from tilestream.server.run import bind, serve
serve(FakeAsyncEngine(), ByteTokenizer(), bind("127.0.0.1", 0), model_name="fake", max_model_len=MAX_MODEL_LEN)
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if ready := re.search(r"Ready: (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # the pipe must not fill up
                yield process, ready[1]
                return
        pytest.fail("the server did not get ready")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_answers_end(server: tuple[subprocess.Popen[str], str], number: signal.Signals) -> None:
    process, url = server
    body = {"prompt": "SLOW", "max_tokens": 30, "stream": True}
    text = ""
    with httpx.stream("POST", f"{url}/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line and not text:
                process.send_signal(number)
            text += line
    assert text.endswith("data: [DONE]") and text.count('"text"') > 20
    assert process.wait(10) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")


def test_a_taken_port_is_told_in_words() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            bind("127.0.0.1", port)
