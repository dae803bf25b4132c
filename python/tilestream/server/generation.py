"""One HTTP request -> its engine requests (prompts x n), merged into one stream of deltas.

Whoever stops reading stops the engine: leaving the stream early, by an error, a cancelled task or a
client that hung up, cancels every engine request of this HTTP request, which frees their pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from tilestream.engine.errors import EngineDeadError, PromptTooLongError, QueueFullError
from tilestream.server.errors import ApiError, internal_error
from tilestream.server.metrics import RequestTimer, ServerMetrics

if TYPE_CHECKING:
    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.engine.request import RequestDelta, RequestOptions
    from tilestream.sampling_params import SamplingParams

    Deltas = AsyncGenerator[tuple[int, RequestDelta], None]  # (index of the choice, what is new for it)

logger = logging.getLogger("tilestream.server")
T = TypeVar("T")


class ClientLeftError(Exception):
    """The client closed its connection: nobody will read an answer."""


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, cancelled as soon as the client hangs up.

    Raises:
        ClientLeftError: the client was gone first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def generate(
    engine: AsyncEngine,
    metrics: ServerMetrics,
    request_id: str,
    prompts: list[list[int]],
    params: list[SamplingParams],
    *,
    prompt_field: str,
    options: RequestOptions,
) -> Deltas:
    """Runs every prompt with every params; yields (choice index, delta) as they come.

    Choice `p * len(params) + i` is prompt p with params[i], as OpenAI numbers them.

    Args:
        prompt_field: the request's field that an error of a prompt is about.
        options: for the scheduler.
    Raises:
        ApiError: the engine refused or failed one of them; the others are aborted.
    """
    num_choices = len(prompts) * len(params)

    async def deltas(choice: int) -> Deltas:
        prompt, sampling = prompts[choice // len(params)], params[choice % len(params)]
        timer = RequestTimer(metrics)
        stream = engine.stream(f"{request_id}-{choice}", prompt, sampling, options)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                timer.on_delta(delta)
                yield choice, delta

    source = deltas(0) if num_choices == 1 else _merged([deltas(choice) for choice in range(num_choices)])
    async with contextlib.aclosing(source):
        try:
            async for choice, delta in source:
                if delta.finish_reason in ("error", "abort"):
                    raise _failure(delta, request_id)
                yield choice, delta
        except ApiError:
            raise
        except Exception as error:
            raise _explain(error, request_id, prompt_field) from None


async def _merged(sources: list[Deltas]) -> Deltas:
    """What several streams give, as it comes; leaving early, or the first error, ends them all."""
    arrived: asyncio.Queue[tuple[int, RequestDelta] | Exception | None] = asyncio.Queue()

    async def pump(source: Deltas) -> None:
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    arrived.put_nowait(item)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(source)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failure(delta: RequestDelta, request_id: str) -> ApiError:
    """For the last delta of a request that did not come to its end."""
    if delta.finish_reason == "error" and delta.stop_reason == "constraint":
        return ApiError(400, delta.error, code="constraint_failed")
    if delta.finish_reason == "error":
        logger.error("%s: %s", request_id, delta.error)
        return ApiError(500, delta.error or "The engine failed on this request.", code="internal_error")
    if delta.error is not None:
        return ApiError(504, delta.error, code="deadline_exceeded")
    return ApiError(503, "The request was aborted: the server is stopping.", code="aborted")


def _explain(error: Exception, request_id: str, prompt_field: str) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param=prompt_field, code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), param=prompt_field)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_stopped")
    logger.error("%s failed", request_id, exc_info=error)
    return internal_error()
