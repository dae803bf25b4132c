"""Runs the server on uvicorn: a listening socket first, a ready line, a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import resource
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from tilestream.server.access import Traffic
from tilestream.server.app import create_app
from tilestream.server.connection import Connection
from tilestream.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.models.tokenizer import Tokenizer

_BACKLOG = 2048
# The head of a request, its path and all its headers.
_MAX_HEAD_BYTES = 32 * 1024
# After the engine has ended every answer: what the last words get to reach their clients.
_LAST_WORDS_S = 2
# After the engine has failed: what the balancer's probe gets to see it.
_FAILED_S = 2

logger = logging.getLogger("tilestream.server")

_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": "tilestream.server.context.RequestIdFilter"}},
    "formatters": {
        "line": {"format": "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"},
        "access": {"format": "%(asctime)s %(message)s"},
    },
    "handlers": {
        "line": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request_id"]},
        "access": {"class": "logging.StreamHandler", "formatter": "access"},
    },
    "loggers": {
        "uvicorn": {"handlers": ["line"], "level": "WARNING", "propagate": False},
        "tilestream": {"handlers": ["line"], "level": "INFO", "propagate": False},
        "tilestream.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
    },
}


def log_to_stderr() -> None:
    """What is to be logged before serve() does the same."""
    logging.config.dictConfig(_LOGGING)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the address is not ours or the port is taken, in words.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}.") from None
    return listener


class _Uvicorn(uvicorn.Server):
    """A stop signal begins a drain: the socket stays open, so that a balancer's probe sees that we are not ready, new
    requests are refused, and the running ones end. Past the limit the engine ends them. An engine that has failed ends the
    server, too."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, traffic: Traffic, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._traffic = traffic
        self._drain_timeout_s = drain_timeout_s
        self._drain_end_s = float("inf")
        self._failed_end_s: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Ready: http://{shown}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._traffic.is_draining:  # a second signal: at once
            self._drain_end_s = 0.0
        else:
            self._traffic.is_draining = True
            self._drain_end_s = time.monotonic() + self._drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._engine.failure is not None:
            if self._failed_end_s is None:
                logger.error("%s", self._engine.failure)
                self._failed_end_s = time.monotonic() + _FAILED_S
            return time.monotonic() > self._failed_end_s
        if not self._traffic.is_draining:
            return False
        if self._traffic.num_requests and time.monotonic() < self._drain_end_s:
            return False
        await asyncio.to_thread(self._engine.shutdown)
        return True


def serve(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    listener: socket.socket,
    *,
    model_name: str,
    max_model_len: int,
    settings: ServerSettings = ServerSettings(),
) -> None:
    """Serves until SIGINT or SIGTERM; then no new requests, and running answers may end. A second signal: at once.

    Raises:
        EngineDeadError: the engine has failed. Its clients know.
    """
    app = create_app(engine, tokenizer, model_name=model_name, max_model_len=max_model_len, settings=settings)
    _allow_many_connections()
    # A signal that comes when uvicorn has let go of them finds the work done: the exit code stays 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = _Uvicorn(configure(app, settings, _LOGGING), engine, app.server.traffic, settings.drain_timeout_s)
    server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def configure(app: FastAPI, settings: ServerSettings, log_config: dict[str, Any] | None) -> uvicorn.Config:
    """Uvicorn's own settings."""
    return uvicorn.Config(
        app,
        http=partial(Connection, settings),
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_LAST_WORDS_S,
        timeout_keep_alive=settings.keep_alive_s,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        access_log=False,
        server_header=False,
        log_config=log_config,
    )


def _allow_many_connections() -> None:
    """A connection is a file: take as many as this process may have, where the soft limit is lower."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
