"""The ASGI application: the routes, and what every request passes on its way to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import tilestream
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from tilestream.server.access import Guard, RequestLog
from tilestream.server.errors import install_error_handlers
from tilestream.server.http import Server, add_generation_routes
from tilestream.server.information import add_information_routes
from tilestream.server.openapi import complete
from tilestream.server.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.models.tokenizer import Tokenizer


class _App(FastAPI):
    """FastAPI with the request log around everything, its own answer to a failure included."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(**options)
        self.server = server

    def build_middleware_stack(self) -> ASGIApp:
        inner = super().build_middleware_stack()
        return RequestLog(inner, self.server.settings, self.server.traffic, self.server.telemetry)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi())
        return self.openapi_schema


def create_app(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    max_model_len: int,
    settings: ServerSettings = ServerSettings(),
) -> FastAPI:
    """The ASGI application.

    Args:
        engine, tokenizer, model_name, max_model_len, settings: as for Server.
    """
    server = Server(engine, tokenizer, model_name=model_name, max_model_len=max_model_len, settings=settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.shutdown)
        server.tokenizing.shutdown()
        server.compiling.shutdown()
        if server.telemetry is not None:
            await asyncio.to_thread(server.telemetry.close)

    app = _App(server, title="Tilestream", version=tilestream.__version__, lifespan=lifespan)
    app.add_middleware(Guard, settings=settings, traffic=server.traffic)
    if settings.cors_origins:  # outside the guard, so that a page may read why it was refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    install_error_handlers(app)
    add_generation_routes(app, server)
    add_information_routes(app, server)
    return app
