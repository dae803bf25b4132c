"""The way in: request ids and the access log around every request; keys, the drain and the body's limits before it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilestream.engine.request import RequestOptions
from tilestream.server.context import RequestContext, begin_context, current
from tilestream.server.errors import CLIENT_LEFT_STATUS, ApiError
from tilestream.server.settings import ServerSettings

if TYPE_CHECKING:
    from tilestream.server.telemetry import Telemetry

logger = logging.getLogger("tilestream.access")

# What probes, scrapers and a browser that has yet to ask for a key must reach. None of it shows what others sent.
_OPEN_PATHS = frozenset(
    {"/", "/favicon.ico", "/health", "/health/ready", "/ready", "/metrics", "/docs", "/openapi.json"}
)
# Ids of clients go into our log as they are, so they may hold nothing but these.
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# A refused client that still sends is read from for so long: closing on it at once would reset the connection, and it
# would never see why.
_LINGER_S = 3.0


class Traffic:
    """How many requests are on their way, and whether the server takes more."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.is_draining = False


def within_limits(wishes: RequestOptions, server_limit_s: float | None) -> RequestOptions:
    """What the scheduler is told of the request at hand: its wishes, whose it is, and the sooner of two deadlines."""
    deadlines_s = [wishes.deadline_s, None if server_limit_s is None else time.monotonic() + server_limit_s]
    deadline_s = min((at_s for at_s in deadlines_s if at_s is not None), default=None)
    return replace(wishes, tenant=current().tenant, deadline_s=deadline_s)


class RequestLog:
    """The outermost layer: every request gets an id, is counted, and leaves one line, without a word of its text.

    The client's own X-Request-Id is taken if it is a plain word; the answer has it either way.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, traffic: Traffic, telemetry: Telemetry | None) -> None:
        self._app = app
        self._settings = settings
        self._traffic = traffic
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s, status, is_whole = time.monotonic(), CLIENT_LEFT_STATUS, False
        context = begin_context(_request_id(scope))

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message["headers"]) | {b"x-request-id": context.request_id.encode()}
                if self._traffic.is_draining:  # a balancer's kept connections must not come back
                    headers[b"connection"] = b"close"
                message["headers"] = list(headers.items())
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._traffic.num_requests += 1
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            self._traffic.num_requests -= 1
            if self._settings.access_log:
                shown = f"{status}{'' if is_whole else ' cut'}"
                logger.info("%s", _line(scope, context, shown, time.monotonic() - begin_s))
            if self._telemetry is not None and context.answer is not None:
                self._telemetry.export(scope, context, status, time.monotonic() - begin_s)


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def _line(scope: Scope, context: RequestContext, status: str, seconds: float) -> str:
    path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0]  # percent-encoded: it cannot begin a line
    line = f"{scope['method']} {path[:200].decode('latin-1')} {status} {1e3 * seconds:.1f} ms"
    if context.answer is not None:
        usage = context.answer.usage()
        line += f" tokens {usage['prompt_tokens']} in {usage['completion_tokens']} out"
    return line + f" tenant={context.tenant or '-'} id={context.request_id}"


class _RefusedError(Exception):
    """Comes out of `receive`, past the handlers of the routes, as only out here the connection is closed with care."""

    def __init__(self, answer: ApiError) -> None:
        super().__init__(answer.message)
        self.answer = answer


class Guard:
    """Lets in whoever has a key, unless the server drains, with a body that is short enough and comes soon enough."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, traffic: Traffic) -> None:
        self._app = app
        self._settings = settings
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            await self._app(scope, self._limited(receive), send)
        except _RefusedError as refused:
            await _refuse(refused.answer, scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._settings.api_keys and scope["path"] not in _OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            tenant = self._settings.api_keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
            if tenant is None:
                message = "An API key is needed: send it as 'Authorization: Bearer KEY'."
                if scheme:
                    message = f"The API key is not one of this server's. {message}"
                raise _RefusedError(ApiError(401, message, code="invalid_api_key"))
            current().tenant = tenant
        if self._traffic.is_draining and scope["method"] == "POST":
            answer = ApiError(503, "The server is stopping; ask another one.", code="draining", retry_after_s=1)
            raise _RefusedError(answer)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._settings.max_body_bytes:
            raise self._too_large(f"{int(declared)} bytes")

    def _limited(self, receive: Receive) -> Receive:
        end_s = time.monotonic() + self._settings.body_timeout_s
        received_bytes = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal received_bytes, complete
            if complete:
                return await receive()  # waits for the client to leave, as long as it takes
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end_s - time.monotonic()))
            except asyncio.TimeoutError:
                limit_s = self._settings.body_timeout_s
                text = f"The request's body has not come within {limit_s:g} s; {received_bytes} bytes of it have."
                raise _RefusedError(ApiError(408, text, code="body_timeout")) from None
            received_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received_bytes > self._settings.max_body_bytes:
                raise self._too_large(f"more than {self._settings.max_body_bytes} bytes")
            return message

        return limited_receive

    def _too_large(self, got: str) -> _RefusedError:
        message = f"The request body is {got}; at most {self._settings.max_body_bytes} bytes are allowed."
        return _RefusedError(ApiError(413, message, code="body_too_large"))


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with an error and closes the connection; for a while, what the client still sends is read and forgotten."""
    response = error.response()
    response.headers["connection"] = "close"
    # Who waits for "100 Continue" sends no body after this answer; who was too slow has had its time.
    sends_no_more = error.status == 408 or b"expect" in dict(scope["headers"])

    async def send_and_linger(message: Message) -> None:
        if message["type"] == "http.response.body" and not sends_no_more:
            await send(message | {"more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_forget_body(receive), _LINGER_S)
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    await response(scope, receive, send_and_linger)


async def _forget_body(receive: Receive) -> None:
    message = await receive()
    while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()
