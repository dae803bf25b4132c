"""The commands with the demo model, as a newcomer runs them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tilestream import LLM, SamplingParams
from tilestream.cli.options import DEFAULT_MODEL
from tilestream.llm import DEFAULT_MODEL as LLM_DEFAULT_MODEL

from .conftest import wait_until

COMMAND = (sys.executable, "-m", "tilestream")
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def expected() -> str:
    """The model's greedy answer, by the Python API."""
    llm = LLM(kv_cache_tokens=1024)
    return llm.chat(MESSAGES, SamplingParams(max_tokens=NUM_TOKENS, temperature=0)).text


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `tilestream serve` with little room, whose trace must be whole at the end."""
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    limits = ("--kv-cache-tokens", "4096", "--max-num-seqs", "2", "--max-queued-requests", "4", "--batch-invariant")
    limits += ("--trace", str(trace), "--trace-kernels", "2")
    process = subprocess.Popen([*COMMAND, "serve", "--port", "0", *limits], stderr=subprocess.PIPE, text=True)
    try:
        ready = next(filter(None, (re.search(r"Ready: (http://\S+)/v1", line) for line in process.stderr)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield ready[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        events = json.loads(trace.read_text())
        names = {event["name"] for event in events}
        assert {"step", "schedule", "launch", "collect", "request", "queued", "prefill", "decode"} <= names
        assert any(name.startswith("tilestream::") for name in names)  # ops, by torch's profiler
        assert QUESTION not in trace.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def metric(url: str, name: str) -> float:
    found = re.search(rf"^tilestream:{name}{{.*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_one_default_model() -> None:
    assert DEFAULT_MODEL == LLM_DEFAULT_MODEL


def test_generate(expected: str) -> None:
    arguments = ["generate", "--max-tokens", str(NUM_TOKENS)]
    done = subprocess.run([*COMMAND, *arguments], input=QUESTION, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"
    (line,) = done.stderr.strip().splitlines()
    parts = (r"first token after \S+ s", r"prompt \d+ tokens, \S+ tok/s", r"answer \d+ tokens, \S+ tok/s")
    assert re.fullmatch(r" \| ".join([*parts, r"loaded in \S+ s"]), line)


def test_generate_into_a_closed_pipe() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "--raw", "Once"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(20) == 1


def test_bench(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    sizes = ["--prompt-tokens", "40", "--decode-tokens", "4", "--batch-sizes", "1,3", "--repeats", "1", "--dtype", "bfloat16"]
    done = subprocess.run([*COMMAND, "bench", *sizes, "--json", str(result)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(result.read_text())
    cases = facts["cases"]
    assert facts["weight_bytes"] > 135e6 * 1.9 and facts["kv_token_bytes"] == 30 * 3 * 2 * 64 * 2
    assert [(case["name"], case["batch_size"]) for case in cases] == [("prompt", 1), ("decode", 1), ("decode", 3)]
    assert all(case["median_tok_s"] > 0 for case in cases)
    assert "tok/s" in done.stdout


def test_chat_and_stream(client: openai.OpenAI, expected: str) -> None:
    fields = {"model": DEFAULT_MODEL, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == expected
    logprobs = answer.choices[0].logprobs.content
    assert len(logprobs) == answer.usage.completion_tokens
    assert all(entry.top_logprobs[0].token == entry.token for entry in logprobs)  # greedy takes the likeliest
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert last.usage.completion_tokens == answer.usage.completion_tokens


def test_seeded_choices_do_not_depend_on_company(client: openai.OpenAI) -> None:
    fields = {"model": DEFAULT_MODEL, "prompt": "Once upon a time", "max_tokens": 10, "temperature": 0.9}
    both = client.completions.create(**fields, n=2, seed=5)
    alone = client.completions.create(**fields, seed=6)
    assert both.choices[1].text == alone.choices[0].text


def test_prompt_too_long_for_the_cache(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=DEFAULT_MODEL, prompt=[1] * 5000)
    assert error.value.code == "context_length_exceeded" and "5000" in str(error.value)


def test_leaving_frees_the_pages(client: openai.OpenAI, url: str) -> None:
    fields = {"model": DEFAULT_MODEL, "prompt": "Tell me a story.", "max_tokens": 2000}
    fields["extra_body"] = {"ignore_eos": True}
    stream = client.completions.create(**fields, stream=True)
    next(iter(stream))
    assert metric(url, "num_requests_running") == 1
    assert metric(url, "kv_cache_usage_perc") > 0
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**fields, timeout=0.5)
    wait_until(lambda: metric(url, "num_requests_running") == 0, "the engine still runs what nobody reads")
    assert metric(url, "kv_cache_usage_perc") == 0


def test_queue_full(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.InternalServerError, match="queue is full") as full:
        client.completions.create(model=DEFAULT_MODEL, prompt="x", max_tokens=2000, n=8)
    assert full.value.status_code == 503
    wait_until(lambda: metric(url, "num_requests_running") == 0, "refused, but still running")
    assert client.completions.create(model=DEFAULT_MODEL, prompt="x").choices[0].text
