"""One HTTP request -> its engine requests (prompts x n), merged into one stream of deltas.

Whoever stops reading stops the engine: leaving the stream early, by an error, a cancelled task or a
client that hung up, cancels every engine request of this HTTP request, which frees their pages.
"""

from __future__ import annotations

import asyncio
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

logger = logging.getLogger("tilestream.server")
T = TypeVar("T")

# A place in the queue frees when any request ends, so the shortest wait that the header can say.
_RETRY_AFTER_S = 1


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
    options: RequestOptions,
    *,
    prompt_field: str,
) -> AsyncGenerator[tuple[int, RequestDelta], None]:
    """Runs every prompt with every params; yields (choice index, delta) as they come.

    Choice `p * len(params) + i` is prompt p with params[i], as OpenAI numbers them.

    Args:
        options: of all of them.
        prompt_field: the request's field that an error of a prompt is about.
    Raises:
        ApiError: the engine refused or failed one of them; the others are aborted.
    """
    arrived: asyncio.Queue[tuple[int, RequestDelta | Exception | None]] = asyncio.Queue()

    async def pump(choice: int) -> None:
        prompt, sampling = prompts[choice // len(params)], params[choice % len(params)]
        timer = RequestTimer(metrics)
        try:
            async for delta in engine.stream(f"{request_id}-{choice}", prompt, sampling, options):
                timer.on_delta(delta)
                arrived.put_nowait((choice, delta))
            arrived.put_nowait((choice, None))
        except Exception as error:
            arrived.put_nowait((choice, error))

    tasks = [asyncio.ensure_future(pump(choice)) for choice in range(len(prompts) * len(params))]
    try:
        num_open = len(tasks)
        while num_open:
            choice, item = await arrived.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise _explain(item, request_id, prompt_field)
            elif item.finish_reason == "error":
                logger.error("%s: %s", request_id, item.error)
                raise ApiError(500, item.error or "The engine failed on this request.", code="internal_error")
            elif item.finish_reason == "abort" and item.error is not None:
                raise ApiError(504, item.error, code="deadline_exceeded")
            elif item.finish_reason == "abort":
                raise ApiError(503, "The request was aborted: the server is stopping.", code="aborted")
            else:
                yield choice, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _explain(error: Exception, request_id: str, prompt_field: str) -> ApiError:
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full", retry_after_s=_RETRY_AFTER_S)
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param=prompt_field, code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), param=prompt_field)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_stopped")
    logger.error("%s failed", request_id, exc_info=error)
    return internal_error()
