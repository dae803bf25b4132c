"""`tilestream serve` in a process of its own, and a streaming client for it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.traffic import Ask
from tilestream.cli.load import RequestTimes


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The server's URL, once it says that it is ready."""
    command = [sys.executable, "-m", "tilestream", "serve", "--model", model, "--port", "0", *options]
    server = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        yield next(filter(None, (re.search(r"http://\S+/v1", line) for line in server.stderr)))[0]
    finally:
        server.terminate()
        server.wait(timeout=30)


async def ask_all(url: str, prompts: Sequence[Sequence[int]], asks: Sequence[Ask]) -> list[RequestTimes]:
    """Send the prompts, token ids, each when it is due, as streamed completions."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        await client.get("/models")
        begin_s = time.perf_counter()
        return await asyncio.gather(*(_ask(client, prompt, ask, begin_s) for prompt, ask in zip(prompts, asks, strict=True)))


async def _ask(client: httpx.AsyncClient, prompt: Sequence[int], ask: Ask, begin_s: float) -> RequestTimes:
    body = {"prompt": prompt, "max_tokens": ask.output_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    await asyncio.sleep(begin_s + ask.arrival_s - time.perf_counter())
    sent_s = time.perf_counter()
    events_s = []  # one per token; "[DONE]", the last, is none
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                events_s.append(time.perf_counter())
    return RequestTimes(sent_s - begin_s, events_s[0] - begin_s, events_s[-1] - begin_s, ask.output_tokens)
