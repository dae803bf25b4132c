"""What a batch will ask of the engine: the server's application is asked, with a stand-in for the engine.

So templates, tools, choices and limits are the server's business here too, and a prompt is token for token
what the engine will get.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tilestream.batch.lines import Line
from tilestream.batch.local_http import post
from tilestream.batch.order import Work
from tilestream.engine.request import RequestDelta, RequestOptions
from tilestream.sampling_params import SamplingParams

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tilestream.engine.async_engine import AsyncEngine

_AT_A_TIME = 16  # the tokenizer's threads are fewer
_Call = tuple[list[int], SamplingParams, RequestOptions]
_calls: ContextVar[list[_Call]] = ContextVar("calls")  # of a line; the server's tasks inherit it


class PlanningEngine:
    """Notes what it is asked, and answers at once with nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def stream(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
    ) -> AsyncIterator[RequestDelta]:
        _calls.get().append((list(prompt_token_ids), params, options))
        yield RequestDelta(
            request_id=request_id,
            token_ids=[],
            finish_reason="length",
            num_prompt_tokens=len(prompt_token_ids),
            num_output_tokens=0,
        )


async def plan_work(
    app: ASGIApp, lines: Sequence[Line], on_line: Callable[[], None]
) -> tuple[list[Work], list[tuple[Line, dict]]]:
    """Ask every line of an application on a PlanningEngine.

    Args:
        lines: without faults.
        on_line: called as each is planned.
    Returns:
        The work that the engine will have, in the order of the lines; and the lines that the server refuses
        without asking the engine, with its answers as `response` of the output.
    """
    works: list[Work] = []
    refused: list[tuple[Line, dict]] = []

    async def ask(line: Line) -> tuple[list[_Call], dict]:
        calls: list[_Call] = []
        _calls.set(calls)  # of this task, and of those that it starts
        return calls, await respond(app, line)

    for begin in range(0, len(lines), _AT_A_TIME):
        some = lines[begin : begin + _AT_A_TIME]
        for line, (calls, response) in zip(some, await asyncio.gather(*map(ask, some)), strict=True):
            if calls:
                prompts, params, options = zip(*calls, strict=True)
                works.append(Work.of(line, prompts, [p.max_tokens for p in params], options[0].prefix_salt))
            else:
                refused.append((line, response))
            on_line()
    return works, refused


async def respond(app: ASGIApp, line: Line) -> dict:
    """A line's `response` in the output."""
    status, body, request_id = await post(app, line.url, line.body, line.id)
    return {"status_code": status, "request_id": request_id, "body": body}
