"""Whole servers for the tests: the real engine, its thread and uvicorn, over a runner that costs nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.step_plan import SampledTokens, StepPlan
from tilestream.server.app import create_app
from tilestream.server.run import configure
from tilestream.server.settings import ServerSettings

from .fakes import ByteTokenizer

MODEL = "fake-model"


class LetterRunner:
    """Draws letters, and keeps nothing: what memory grows is the engine's or the server's."""

    vocab_size = ByteTokenizer.vocab_size
    overlaps = False

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s

    def launch(self, plan: StepPlan) -> SampledTokens:
        time.sleep(self.step_s)
        rows = [item.request for item in plan.scheduled if item.samples]
        ids = [ord(" ") if r.num_tokens % 6 == 0 else ord("a") + (7 * r.num_tokens + r.seed) % 26 for r in rows]
        return SampledTokens(ids, [-0.5] * len(ids), [[i, 0] for i in ids], [[-0.5, -1.5] for _ in ids])

    def collect(self, launched: SampledTokens) -> SampledTokens:
        return launched


def make_engine(step_s: float = 0.0, **limits: object) -> Engine:
    defaults = {"page_size": 16, "kv_cache_tokens": 16 * 1024, "max_model_len": 2048, "token_budget": 512, "seed": 0}
    config = EngineConfig(**defaults | limits)
    return Engine(LetterRunner(step_s), ByteTokenizer(), config)


@contextmanager
def served(engine: Engine, **settings: object) -> Iterator[str]:
    """The server's address. Afterwards nothing may be left in the engine."""
    settings = ServerSettings(**settings)
    app = create_app(
        AsyncEngine(engine), ByteTokenizer(), model_name=MODEL, max_model_len=engine.config.max_model_len,
        settings=settings,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(configure(app, settings, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        check_idle(engine)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def check_idle(engine: Engine, limit_s: float = 10.0) -> None:
    """Every request has ended, and every page is free."""
    end_s = time.monotonic() + limit_s
    while engine.has_work() or engine.scheduler.pool.num_owned_pages:
        assert time.monotonic() < end_s, f"{len(engine.scheduler.running)} run, {engine.num_waiting} wait"
        time.sleep(0.02)
    engine.scheduler.check_invariants()
