"""One HTTP connection, with limits in time: uvicorn's own, plus those for clients that stop in the middle."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tilestream.server.settings import ServerSettings

logger = logging.getLogger("tilestream.server")

# A peer that is gone without a word (its cable, its power) is noticed after about so long, not after TCP's two hours.
_SILENT_PEER_S = 60


class Connection(H11Protocol):
    """Closes on a client that does not send the head of a request in time, or does not take its answer.

    The answer's bytes wait in a buffer of at most 64 KB (asyncio's high-water mark); past it the request's task waits,
    and with it nobody else: the engine goes on, and what it gives one request is bounded by the request's own limit.
    """

    def __init__(self, settings: ServerSettings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        _expect_a_living_peer(transport.get_extra_info("socket"))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self._give_up, "takes nothing")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. If it was a request's body, the request's task has nobody to answer any more."""
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _await_head(self) -> None:
        """The time for a head runs from its first byte, or the connection's begin, and is not renewed by more bytes."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not is_answering and self._head_timer is None:
            limit_s = self._settings.header_timeout_s
            self._head_timer = self.loop.call_later(limit_s, self._give_up, "sends no request")

    def _give_up(self, why: str) -> None:
        logger.info("closed a connection that %s", why)
        self.transport.abort()


def _expect_a_living_peer(connection: socket.socket | None) -> None:
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_PEER_S // 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_PEER_S // 6)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENT_PEER_S)
