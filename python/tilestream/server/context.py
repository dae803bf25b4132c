"""What is known of the HTTP request at hand: for its log line, its errors, its span."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilestream.engine.request import RequestDelta
    from tilestream.server.protocol import GenerationRequest
    from tilestream.server.responses import Answer


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """One HTTP request.

    tenant: a short hash of its API key; "" without keys.
    body, answer: of a generation, once they are there.
    last_deltas: of its choices, as they end.
    """

    request_id: str = "-"
    tenant: str = ""
    body: GenerationRequest | None = None
    answer: Answer | None = None
    last_deltas: list[RequestDelta] = field(default_factory=list)


_current: ContextVar[RequestContext] = ContextVar("tilestream_request")


def begin_context(request_id: str) -> RequestContext:
    """The context of a new request, seen by all that its task does and starts."""
    context = RequestContext(request_id=request_id)
    _current.set(context)
    return context


def current() -> RequestContext:
    """Of the request at hand; an empty one where there is none."""
    return _current.get(None) or RequestContext()


class RequestIdFilter(logging.Filter):
    """Gives every log record `request_id`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = current().request_id
        return True
