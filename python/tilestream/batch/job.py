"""Answers a batch: plans all requests, then runs them in that order, as many at a time as the KV cache holds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilestream.batch.journal import Journal
from tilestream.batch.lines import Line
from tilestream.batch.order import KvMemory, Work, WorkGroup, in_shared_order
from tilestream.batch.planning import PlanningEngine, plan_work, respond
from tilestream.server.app import create_app

if TYPE_CHECKING:
    from tilestream.engine.async_engine import AsyncEngine
    from tilestream.engine.config import EngineConfig
    from tilestream.models.tokenizer import Tokenizer


Order = Callable[[Sequence[Work], int], list[WorkGroup]]  # of works, with the page size
_STOPPED_STATUS = 503  # the engine takes nothing any more


class BatchStoppedError(RuntimeError):
    """The engine has failed. What was answered is in the output; the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Called as work gets done: once for each line that is planned, and once for each that is in the output."""

    planned: Callable[[], None] = lambda: None
    answered: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Counts:
    """Of a finished job: lines answered now with status 200, and with anything else."""

    num_good: int = 0
    num_failed: int = 0


class BatchJob:
    """One run over a batch file's lines.

    Args:
        engine: its own; it takes as many waiting requests as the cache has pages.
        tokenizer, model_name: as of a server.
        config: the engine's.
        journal: where the answers go.
        progress: told of each line.
        order: in which the requests run.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model_name: str,
        config: EngineConfig,
        journal: Journal,
        progress: Progress = Progress(),
        order: Order = in_shared_order,
    ) -> None:
        self._engine = engine
        self._config = config
        self._journal = journal
        self._progress = progress
        self._order = order
        self._served = {"tokenizer": tokenizer, "model_name": model_name, "max_model_len": config.max_model_len}
        self._counts = Counts()

    async def run(self, lines: Sequence[Line]) -> Counts:
        """Answer these lines, and write each answer as it ends.

        Raises:
            BatchStoppedError: the engine failed; nothing that it did not answer was written.
            OSError: the output cannot be written.
        """
        for line in lines:
            if line.fault is not None:
                self._write(line, None, {"code": "invalid_line", "message": line.fault})
        planning = create_app(PlanningEngine(self._engine), **self._served)
        works, refused = await plan_work(
            planning, [line for line in lines if line.fault is None], self._progress.planned
        )
        for line, response in refused:
            self._write(line, response)
        await self._answer(self._order(works, self._config.page_size))
        return self._counts

    async def _answer(self, groups: list[WorkGroup]) -> None:
        app = create_app(self._engine, **self._served)
        memory = KvMemory(self._config.capacity_tokens, self._config.page_size)
        queue = deque((group, work) for group in groups for work in group.works)
        running: dict[asyncio.Task[dict], tuple[WorkGroup, Work]] = {}
        ended: asyncio.Queue[asyncio.Task[dict]] = asyncio.Queue()

        try:
            while queue or running:
                while queue and memory.fits(*queue[0]):
                    group, work = queue.popleft()
                    memory.take(group, work)
                    task = asyncio.ensure_future(respond(app, work.line))
                    task.add_done_callback(ended.put_nowait)
                    running[task] = group, work
                task = await ended.get()
                group, work = running.pop(task)
                response = task.result()
                if response["status_code"] == _STOPPED_STATUS:
                    raise BatchStoppedError(response["body"]["error"]["message"])
                memory.give_back(group, work, _output_tokens(response))
                self._write(work.line, response)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _write(self, line: Line, response: dict | None, error: dict | None = None) -> None:
        self._journal.append({"id": line.id, "custom_id": line.custom_id, "response": response, "error": error})
        if response is not None and response["status_code"] == 200:
            self._counts.num_good += 1
        else:
            self._counts.num_failed += 1
        self._progress.answered()


def _output_tokens(response: dict) -> int:
    return (response["body"].get("usage") or {}).get("completion_tokens", 0)
