"""Requests to the server's application in this process: a batch is answered by what answers clients."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

logger = logging.getLogger("tilestream.batch")


async def post(app: ASGIApp, path: str, body: bytes, request_id: str) -> tuple[int, dict[str, Any], str]:
    """Send JSON.

    Args:
        request_id: goes with it as X-Request-Id.
    Returns:
        The status, the JSON of the answer, and the id by which the server calls the request.
    """
    begun: Message = {}
    answer = bytearray()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # we never hang up
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            begun.update(message)
        else:
            answer.extend(message.get("body", b""))

    headers = {
        "host": "batch",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
    }
    try:
        await app(scope, receive, send)
    except Exception:
        if "status" not in begun:
            raise
        logger.exception("%s failed", request_id)  # the application has answered 500, and raises for the log
    names = dict(begun["headers"])
    return begun["status"], json.loads(answer), names.get(b"x-request-id", request_id.encode()).decode()
