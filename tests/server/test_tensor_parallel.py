"""`tilestream serve` on two ranks, as an operator has it: the same answers, a drain, and one end for all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import psutil
import pytest
from tilestream import LLM, SamplingParams
from tilestream._native import _C
from tilestream.engine.errors import RankDiedError

from .conftest import wait_until

# With activations of 8 bits a sum in another order may round to another integer, and change a near tie.
MODEL = {"act_bits": "16", "kv_cache_tokens": 4096}
SERVE = [
    "-m",
    "tilestream",
    "serve",
    "--tensor-parallel-size",
    "2",
    "--act-bits",
    "16",
    "--kv-cache-tokens",
    "4096",
    "--port",
    "0",
]
PROMPTS = ["Once upon a time", "The capital of France is", "def f(x):", "A list of colours: red, green,"]
STORY = {"model": "smollm2-135m-instruct", "prompt": "Once upon a time", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}


class Server:
    """A server's process, its address, and what it has printed."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self._found(r"Ready: (http://\S+/v1)") or self.process.poll() is not None, "not ready", 60)
        self.url = self._found(r"Ready: (http://\S+)/v1")
        assert self.url, self.lines
        self.ranks = psutil.Process(self.process.pid).children(recursive=True)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def wait(self) -> int:
        """The exit code, when nothing of it is left."""
        code = self.process.wait(20)
        self._reader.join(5)
        assert not psutil.wait_procs(self.ranks, timeout=5)[1], "a rank outlives the server"
        return code

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def _found(self, pattern: str) -> str | None:
        found = re.search(pattern, "".join(self.lines))
        return found and found[1]


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start_one(*command: str) -> Server:
        started.append(Server(*command))
        return started[-1]

    yield start_one
    for server in started:
        server.process.kill()
        server.process.wait()
        psutil.wait_procs(server.ranks, timeout=5)
    assert not any(name.startswith("tilestream") for name in os.listdir("/dev/shm")), "shared memory is left"


def test_answers_and_a_drain(start: Callable[..., Server]) -> None:
    server = start(*SERVE)
    llm = LLM(**MODEL)
    expected = [output.text for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16))]
    drawn = llm.generate(PROMPTS[0], SamplingParams(temperature=0.9, top_k=40, seed=3, max_tokens=16))[0].text
    client = server.client()
    common = {"model": llm.name, "max_tokens": 16}
    answer = client.completions.create(**common, prompt=PROMPTS, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    again = client.completions.create(**common, prompt=PROMPTS[0], temperature=0, logprobs=2, echo=True).choices[0]
    assert again.text == PROMPTS[0] + expected[0] and None not in again.logprobs.token_logprobs[1:]
    fields = {"temperature": 0.9, "seed": 3, "extra_body": {"top_k": 40}}
    assert client.completions.create(**common, prompt=PROMPTS[0], **fields).choices[0].text == drawn
    num_chunks = 0
    for _ in client.completions.create(**STORY | {"max_tokens": 60}, stream=True):
        if num_chunks == 0:
            for process in (server.process, *server.ranks):  # as from a terminal, a service manager or torchrun
                process.send_signal(signal.SIGTERM)
        num_chunks += 1
    assert num_chunks >= 30
    assert server.wait() == 0
    assert [line.split("] ")[1] for line in server.lines if "rank" in line] == ["2 ranks, joined by shared memory\n"]
    assert not any("ERROR" in line or "Traceback" in line for line in server.lines), server.lines


def test_a_killed_rank_ends_the_server(start: Callable[..., Server]) -> None:
    server = start(*SERVE)
    client = server.client()
    errors: list[Exception] = []

    def ask(stream: bool) -> None:
        try:
            for _ in client.completions.create(**STORY, stream=stream) if stream else [client.completions.create(**STORY)]:
                begun.set()
        except openai.APIError as error:
            errors.append(error)

    begun = threading.Event()
    threads = [threading.Thread(target=ask, args=(i == 0,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    (rank_1,) = server.ranks
    rank_1.kill()
    begin_s = time.monotonic()
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, "/health stays green")
    words = f"rank 1 of 2 (process {rank_1.pid}) was killed by SIGKILL; all ranks end"
    late = httpx.post(f"{server.url}/v1/completions", json={"prompt": "late"})
    assert late.status_code == 503 and late.json()["error"]["message"] == words
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3 and all(words in str(error) for error in errors)
    assert sorted(getattr(error, "status_code", 200) for error in errors) == [200, 503, 503]
    assert server.wait() == 1 and time.monotonic() - begin_s < 8
    assert sum(words in line for line in server.lines) == 1 and "Traceback" not in "".join(server.lines)


def test_a_new_model_after_a_death() -> None:
    """Nobody has closed the old one; `with` closes the new one."""
    known, num_threads = psutil.Process().children(), _C.num_threads()
    params = SamplingParams(temperature=0, max_tokens=4)
    dead = LLM(**MODEL, tensor_parallel_size=2)
    (rank_1,) = (process for process in psutil.Process().children() if process not in known)
    rank_1.kill()
    with pytest.raises(RankDiedError, match=rf"rank 1 of 2 \(process {rank_1.pid}\) was killed by SIGKILL"):
        dead.generate(PROMPTS, params)
    with LLM(**MODEL, tensor_parallel_size=2) as llm:
        assert [len(output.token_ids) for output in llm.generate(PROMPTS, params)] == [4] * len(PROMPTS)
    assert psutil.Process().children() == known
    dead.close()
    assert _C.num_threads() == num_threads


def test_torchrun(start: Callable[..., Server]) -> None:
    server = start("-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable, *SERVE)
    assert server.client().completions.create(**STORY | {"max_tokens": 4}).usage.completion_tokens == 4
    server.process.send_signal(signal.SIGTERM)
    server.wait()
    assert not any("rank 0 is gone" in line for line in server.lines), server.lines
