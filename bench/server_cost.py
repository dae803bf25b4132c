"""What the engine and the server cost per token beside the model: `python -m bench.server_cost` prints a Markdown table.

The runner computes nothing, so all that is left is Python: a step's time at 32 running requests, and the CPU time of the whole
server process per streamed token while 32 clients, in another process, read.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import statistics
import threading
import time

import uvicorn

from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.step_plan import SampledTokens, StepPlan
from tilestream.sampling_params import SamplingParams
from tilestream.server.app import create_app

REQUESTS, TOKENS = 32, 300
STEP_S = 0.02  # what a step takes on the server: about a decode of SmolLM2 at batch 32 on 2 cores
PARAMS = {"plain": {}, "logprobs": {"logprobs": 1}, "stop strings": {"stop": ("zzz",)}}
BODIES = {
    "completions": ("completions", {"prompt": "x" * 60}),
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "chat, logprobs": ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
}


class LetterTokenizer:
    """Every token is `abcd`."""

    vocab_size, eos_token_ids, chat_template = 257, frozenset({256}), None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return b"abcd"

    def apply_chat_template(self, messages: list, tools: list | None = None) -> str:
        return "x" * 60


class IdleRunner:
    vocab_size, overlaps = 257, False

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def launch(self, plan: StepPlan) -> int:
        return plan.num_samples

    def collect(self, num: int) -> SampledTokens:
        time.sleep(self.step_s)
        return SampledTokens([97] * num, [-0.5] * num, [[97]] * num, [[-0.5]] * num)


def make_engine(step_s: float) -> Engine:
    config = EngineConfig(kv_cache_tokens=REQUESTS * 1024, max_model_len=1024)
    return Engine(IdleRunner(step_s), LetterTokenizer(), config)


def step_us(params: dict) -> float:
    engine = make_engine(0)
    engine.runner.collect = lambda num: SampledTokens([97] * num, [-0.5] * num, [[97]] * num, [[-0.5]] * num)
    for i in range(REQUESTS):
        engine.add_request(str(i), range(1, 60 + i), SamplingParams(max_tokens=800, ignore_eos=True, **params))
    times = []
    for _ in range(500):
        begin_s = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times) * 1e6


def read_streams(port: int, path: str, body: dict) -> None:
    content = json.dumps(body | {"stream": True, "max_tokens": TOKENS, "ignore_eos": True})
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Connection: close\r\n\r\n{content}".encode())
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(REQUESTS)))

    asyncio.run(all_of_them())


def token_us(path: str, body: dict) -> float:
    app = create_app(AsyncEngine(make_engine(STEP_S)), LetterTokenizer(), model_name="x", max_model_len=1024)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    client = multiprocessing.get_context("spawn").Process(target=read_streams, args=(listener.getsockname()[1], path, body))
    client.start()
    begin_s = time.process_time()
    client.join()
    cpu_s = time.process_time() - begin_s
    server.should_exit = True
    thread.join()
    return cpu_s / (REQUESTS * TOKENS) * 1e6


def main() -> None:
    print(f"| at {REQUESTS} requests | us |\n|---|---|")
    for name, params in PARAMS.items():
        print(f"| a step, {name} | {min(step_us(params) for _ in range(5)):.0f} |", flush=True)
    for name, (path, body) in BODIES.items():
        print(f"| a streamed token, CPU, {name} | {min(token_us(path, body) for _ in range(3)):.0f} |", flush=True)


if __name__ == "__main__":
    main()
