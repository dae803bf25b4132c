"""Two replicas on a Ray of this machine, through the real client."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import wait_until

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    command = "serve --replicas 2 --num-threads 1 --kv-cache-tokens 4096 --port 0 --drain-timeout 120"
    process = subprocess.Popen([sys.executable, "-m", "tilestream", *command.split()], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    wait_until(lambda: "Ready: " in "".join(lines) or process.poll() is not None, "not ready", 300)
    found = re.search(r"Ready: (http://\S+/v1)", "".join(lines))
    assert found, lines
    yield process, openai.OpenAI(base_url=found[1], api_key="unused", max_retries=0)
    process.kill()
    process.wait()


def test_a_prefix_is_cached_where_it_goes(server: tuple[subprocess.Popen[str], openai.OpenAI]) -> None:
    client = server[1]
    for topic in ("rain", "stones", "trains", "birds", "glass", "salt"):
        prompt = f"Let me tell you all there is to know about {topic}. " * 8
        answers = [
            client.completions.create(model=MODEL, prompt=prompt + end, max_tokens=2) for end in ("One.", "Two.", "Three.")
        ]
        cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
        assert cached[0] == 0 and min(cached[1:]) >= 64, (topic, cached)


def test_the_servers_own_answers(server: tuple[subprocess.Popen[str], openai.OpenAI]) -> None:
    client = server[1]
    chunks = list(client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True))
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole and len(chunks) > 4
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")


def test_metrics_of_all(server: tuple[subprocess.Popen[str], openai.OpenAI]) -> None:
    client = server[1]
    url = str(client.base_url).removesuffix("/v1/") + "/metrics"

    def answered() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(url).raise_for_status().text)
        samples = [s for family in families for s in family.samples if s.name == "tilestream:e2e_request_latency_seconds_count"]
        return {sample.labels["replica"]: sample.value for sample in samples}

    before = answered()
    assert len(before) == 2
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=2)
    after = answered()
    assert after.keys() == before.keys() and sum(after.values()) == sum(before.values()) + 3


def test_a_stop_signal_lets_answers_end(server: tuple[subprocess.Popen[str], openai.OpenAI]) -> None:
    process, client = server
    fields = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    num_chunks = 0
    for _ in client.completions.create(**fields, stream=True):
        if num_chunks == 0:
            process.send_signal(signal.SIGTERM)
        num_chunks += 1
    assert num_chunks > 50
    assert process.wait(60) == 0
