"""The engine on a thread of its own, with streams for asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from tilestream.engine.config import EngineConfig
from tilestream.engine.engine import Engine
from tilestream.engine.errors import EngineDeadError
from tilestream.engine.metrics import EngineMetrics, StepLog
from tilestream.engine.request import Request, RequestDelta, RequestOptions
from tilestream.sampling_params import SamplingParams

logger = logging.getLogger("tilestream.engine")

_Item = RequestDelta | Exception  # what a channel carries; an exception, or a finish_reason, is the last


def _is_last(item: _Item) -> bool:
    return isinstance(item, Exception) or item.finish_reason is not None


class _Channel:
    """The engine's end of one stream: it is written to whether or not anyone reads."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.items: asyncio.Queue[_Item] = asyncio.Queue()


class RequestStream:
    """The deltas of one request, as they come: `async for delta in stream`.

    A reader that goes away before the last delta aborts the request: by cancellation, by aclose() or
    leaving `async with`, or by dropping the stream.
    """

    def __init__(self, channel: _Channel, abort: Callable[[_Channel], None]) -> None:
        self._channel = channel
        self._abort = abort
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._channel.items.get()
        except asyncio.CancelledError:
            self.close()
            raise
        self._ended = _is_last(item)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop reading; aborts the request unless it has ended. May be called twice."""
        if not self._ended:
            self._ended = True
            self._abort(self._channel)

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncEngine:
    """Runs an Engine's steps on one thread while there is work, and sleeps otherwise.

    Only that thread changes the engine; others make and check their requests themselves, and leave commands, which it takes
    between steps. Results go to each reader's event loop by call_soon_threadsafe, so no reader, however slow or dead, holds up
    a step.

    Args:
        engine: used by nobody else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()  # guards all below; reentrant, so __del__ may need it any time
        self._commands: deque[Callable[[], None]] = deque()
        self._channels: dict[str, _Channel] = {}  # requests whose last item is not delivered yet
        self._num_unqueued = 0  # requests accepted here that the engine has not seen yet
        self._num_unqueued_tokens = 0  # of their prompts
        self._stopping = False
        self._failure: EngineDeadError | None = None
        self._ended = threading.Event()  # the thread has, or a fault keeps it from it
        self._thread = threading.Thread(target=self._run, name="tilestream-engine", daemon=True)
        self._thread.start()

    def stream(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
    ) -> RequestStream:
        """Start a request; call it in a running event loop.

        Raises:
            ValueError, TypeError, PromptTooLongError, QueueFullError: as Engine.add_request.
            EngineDeadError: after shutdown() or a fault.
        """
        request = self._engine.make_request(request_id, prompt_token_ids, params, options)
        num_tokens = request.num_tokens
        channel = _Channel(request_id, asyncio.get_running_loop())
        with self._condition:
            self._check_running()
            if request_id in self._channels:
                raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
            self._engine.check_queue(num_tokens, num_requests=self._num_unqueued, num_tokens=self._num_unqueued_tokens)
            self._channels[request_id] = channel
            self._num_unqueued += 1
            self._num_unqueued_tokens += num_tokens
            self._commands.append(lambda: self._add_now(request))
            self._condition.notify()
        return RequestStream(channel, self._abort_channel)

    def prepare(self, params: SamplingParams) -> None:
        """Compile what a stream() with these parameters will need. It may take long: call it on a thread of its own first.

        Raises:
            ValueError: as stream() would.
        """
        self._engine.prepare(params)

    def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last delta with finish_reason "abort". Unknown ids are ignored."""
        with self._condition:
            channel = self._channels.get(request_id)
        if channel is not None:
            self._abort_channel(channel)

    @property
    def metrics(self) -> EngineMetrics:
        return self._engine.metrics

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def steps(self) -> StepLog:
        """The last steps; may be read by any thread."""
        return self._engine.watch.steps

    @property
    def failure(self) -> EngineDeadError | None:
        """The fault that has ended it; None: there was none."""
        return self._failure

    @property
    def is_running(self) -> bool:
        """Whether requests can run: not shut down, no fault."""
        return not self._stopping and self._failure is None and self._thread.is_alive()

    def shutdown(self) -> None:
        """Abort everything, end all streams, stop the thread. Waits for the step in progress, unless the engine has failed;
        may be called twice."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._ended.wait()
        if self._failure is None:
            self._thread.join()

    def fail(self, error: EngineDeadError) -> None:
        """End all streams with this error, now: no step will end any more. Any thread may call it."""
        with self._condition:
            if self._failure is not None:
                return
            self._failure = error
            self._condition.notify()
            orphans = list(self._channels)
        self._deliver((request_id, error) for request_id in orphans)
        self._ended.set()

    def _check_running(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure)) from self._failure
        if self._stopping:
            raise EngineDeadError("the engine is shut down")

    def _abort_channel(self, channel: _Channel) -> None:
        with self._condition:
            if self.is_running:
                self._commands.append(lambda: self._abort_now(channel))
                self._condition.notify()

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._run_commands()
                self._deliver((delta.request_id, delta) for delta in self._engine.step())
            self._run_commands()
            for channel in list(self._channels.values()):
                self._abort_now(channel)
        except EngineDeadError as error:
            self.fail(error)
        except BaseException as error:
            logger.exception("the engine failed")
            self.fail(EngineDeadError(f"the engine has failed: {error!r}"))
        self._ended.set()

    def _wait_for_work(self) -> bool:
        with self._condition:
            self._condition.wait_for(
                lambda: self._stopping or self._failure is not None or self._commands or self._engine.has_work()
            )
            return not self._stopping and self._failure is None

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _add_now(self, request: Request) -> None:
        with self._condition:
            self._num_unqueued -= 1
            self._num_unqueued_tokens -= request.num_tokens
            self._engine.enqueue(request)

    def _abort_now(self, channel: _Channel) -> None:
        # The id may belong to a newer request by now: this one's last delta was on its way when it was dropped.
        if self._channels.get(channel.request_id) is channel:
            last = self._engine.abort(channel.request_id)
            if last is not None:
                self._deliver([(channel.request_id, last)])

    def _deliver(self, items: Iterable[tuple[str, _Item]]) -> None:
        """Hand items to their readers' loops: one wake-up per loop, however many readers it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Channel, _Item]]] = defaultdict(list)
        with self._condition:
            for request_id, item in items:
                channel = self._channels.pop(request_id, None) if _is_last(item) else self._channels.get(request_id)
                if channel is not None:
                    by_loop[channel.loop].append((channel, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed, its readers are gone
                for channel, _ in batch:
                    self._abort_channel(channel)


def _put_all(batch: list[tuple[_Channel, _Item]]) -> None:
    for channel, item in batch:
        channel.items.put_nowait(item)
