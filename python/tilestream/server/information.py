"""The routes that generate nothing: models, tokens, health, metrics, the batch's last steps, and the page at /."""

from __future__ import annotations

import time
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tilestream.server.errors import ApiError
from tilestream.server.tokens import add_token_routes

if TYPE_CHECKING:
    from tilestream.engine.metrics import StepRecord
    from tilestream.server.http import Server

# The page talks to this server alone, whatever a model makes it show, and stands in nobody's frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_information_routes(app: FastAPI, server: Server) -> None:
    _add_model_routes(app, server)
    add_token_routes(app, server)
    _add_state_routes(app, server)


def _add_model_routes(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model_card


def _add_state_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process is worth keeping: its engine runs."""
        if not server.engine.is_running:
            why = server.engine.failure or "the log says why"
            raise ApiError(503, f"The engine has stopped: {why}.", code="engine_stopped")
        return {"status": "ok"}

    @app.get("/ready")
    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """Whether requests should be sent here: the model is loaded, and nobody has told the server to stop."""
        if server.traffic.is_draining:
            raise ApiError(503, "The server is stopping; running answers end.", code="draining")
        return await health()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/engine/steps")
    async def steps(since: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        """The batch now, and its steps from number `since` on, as far as they are kept. A `next` below `since` says that the
        server has begun anew."""
        next_index = server.engine.steps.next_index
        found = server.engine.steps.since(since)
        return {
            "now_s": time.monotonic(),
            "next": found[-1].index + 1 if found else next_index,
            "engine": _state(server),
            "steps": [_step_json(step) for step in found],
        }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers=_PAGE_HEADERS)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


@cache
def _page() -> str:
    return (resources.files("tilestream.server") / "page/index.html").read_text(encoding="utf-8")


def _state(server: Server) -> dict[str, Any]:
    now = server.engine.metrics
    return {
        "model": server.model_name,
        "max_model_len": server.max_model_len,
        "tbt_ms": server.engine.config.tbt_ms,
        "is_draining": server.traffic.is_draining,
        "num_running": now.num_requests_running,
        "num_waiting": now.num_requests_waiting,
        "kv_cache_usage": now.kv_cache_usage,
        "num_preemptions": now.num_preemptions,
        "prefix_cache_queries": now.prefix_cache_queries,
        "prefix_cache_hits": now.prefix_cache_hits,
        "prompt_tokens": now.prompt_tokens,
        "generation_tokens": now.generation_tokens,
    }


def _step_json(step: StepRecord) -> dict[str, float]:
    return {
        "step": step.index,
        "begin_s": step.begin_s,
        "seconds": step.end_s - step.begin_s,
        "prefill_tokens": step.prefill_tokens,
        "decode_tokens": step.decode_tokens,
        "budget_tokens": step.budget_tokens,
        "num_running": step.num_running,
        "num_waiting": step.num_waiting,
        "kv_cache_usage": step.kv_cache_usage,
    }
