"""Two replicas on a Ray of this machine, through the real client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tilestream.server.run import bind

from tests.server.conftest import wait_until

MODEL = "smollm2-135m-instruct"


@contextmanager
def started(options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and where it is ready."""
    command = [sys.executable, "-m", "tilestream", "serve", "--num-threads", "1", "--kv-cache-tokens", "4096", *options.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    try:
        wait_until(lambda: "Ready: " in "".join(lines) or process.poll() is not None, "not ready", 300)
        found = re.search(r"Ready: (.+), \d replicas", "".join(lines))
        assert found, lines
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    with started("--replicas 2 --port 0 --drain-timeout 120") as (process, url):
        yield process, openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Serve keeps its address and its applications, and takes us once."""
    import ray
    from ray import serve

    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=200 << 20).address_info
    try:
        with bind("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
        serve.start(http_options={"port": port})

        @serve.deployment(ray_actor_options={"num_cpus": 0})
        class Other:
            async def __call__(self) -> str:
                return "hi"

        serve.run(Other.bind(), name="other", route_prefix="/other")
        url = f"http://127.0.0.1:{port}"
        with started("--replicas 1", RAY_ADDRESS=cluster["gcs_address"]) as (process, where):
            assert where.startswith("where the cluster's Serve listens")
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
            with (
                pytest.raises(AssertionError, match="has a Serve application 'tilestream' already; stop that one first"),
                started("--replicas 1", RAY_ADDRESS=cluster["gcs_address"]),
            ):
                pass
            assert httpx.get(f"{url}/v1/models").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert httpx.get(f"{url}/other").text == "hi" and list(serve.status().applications) == ["other"]
    finally:
        ray.shutdown()
