"""Runs the server on uvicorn: a listening socket first, a ready line, a graceful stop."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

from tilestream.server.http import create_app

if TYPE_CHECKING:
    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.models.tokenizer import Tokenizer

# After a stop signal: what running answers get to end. Process managers kill after 10 s (docker stop) to 30 s.
_GRACE_S = 10
_BACKLOG = 2048


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
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Ready: http://{shown}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)


def serve(
    engine: AsyncEngine, tokenizer: Tokenizer, listener: socket.socket, *, model_name: str, max_model_len: int
) -> None:
    """Serves until SIGINT or SIGTERM; then no new requests, and running answers may end. A second SIGINT: at once."""
    app = create_app(engine, tokenizer, model_name=model_name, max_model_len=max_model_len)
    config = uvicorn.Config(app, backlog=_BACKLOG, timeout_graceful_shutdown=_GRACE_S, log_level="info")
    # uvicorn raises the signal again once it has stopped; then the work is done and the exit code is 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    _Uvicorn(config).run(sockets=[listener])
