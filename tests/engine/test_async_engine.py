"""Streams over a thread: cancellation, dead readers, faults and shutdown, from asyncio's side."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tilestream.constraint import Constraint
from tilestream.engine.async_engine import AsyncEngine
from tilestream.engine.constraints import GrammarCompiler
from tilestream.engine.errors import EngineDeadError, PromptTooLongError, QueueFullError
from tilestream.engine.request import RequestDelta
from tilestream.sampling_params import SamplingParams

from .fakes import GREEDY, expected_output, make_engine, tokens_of

HELLO = list(b"hello")
ENDLESS = SamplingParams(temperature=0, max_tokens=None)
TIMEOUT_S = 20  # generous: only a hang reaches it


class Gate:
    """Lets the runner run one step per permit, or freely."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.is_open = False

    def __call__(self, plan: object) -> None:
        if not self.is_open:
            assert self.permits.acquire(timeout=TIMEOUT_S)

    def open(self) -> None:
        self.is_open = True
        self.permits.release()


@pytest.fixture
def make() -> Iterator[Callable[..., AsyncEngine]]:
    made: list[AsyncEngine] = []

    def make_async(script: dict | None = None, *, gate: Gate | None = None, **config: object) -> AsyncEngine:
        engine = make_engine(script, **config)
        if gate is not None:
            engine.runner.on_run = gate
        made.append(AsyncEngine(engine))
        return made[-1]

    yield make_async
    for engine in made:
        engine.shutdown()


async def collect(engine: AsyncEngine, name: str, params: SamplingParams = GREEDY) -> list[RequestDelta]:
    return [delta async for delta in engine.stream(name, HELLO, params)]


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        await asyncio.sleep(0.001)


def is_idle(engine: AsyncEngine) -> bool:
    now = engine.metrics
    return now.num_requests_running == now.num_requests_waiting == 0 and now.kv_cache_usage == 0


async def test_many_streams_at_once(make) -> None:
    engine = make(max_num_seqs=5)
    results = await asyncio.gather(*[collect(engine, str(i)) for i in range(20)])
    for deltas in results:
        assert tokens_of(deltas) == expected_output(HELLO, GREEDY, 0, 8)
        assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["length"]
    assert is_idle(engine) and engine.is_running


async def test_the_thread_wakes_up_again_after_a_rest(make) -> None:
    engine = make()
    for index in range(3):
        assert len(await collect(engine, str(index))) == 8
        steps = engine.metrics.num_steps
        await asyncio.sleep(0.02)
        assert engine.metrics.num_steps == steps == 8 * (index + 1)


async def test_refusals_come_from_the_call_itself(make) -> None:
    gate = Gate()
    engine = make(gate=gate, max_queued_requests=2, max_num_seqs=1, max_model_len=64)
    with pytest.raises(PromptTooLongError):
        engine.stream("a", [1] * 64, GREEDY)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream("a", [], GREEDY)
    running = engine.stream("a", HELLO, GREEDY)
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.stream("a", HELLO, GREEDY)
    await until(lambda: engine.metrics.num_requests_running == 1)
    waiting = [engine.stream(name, HELLO, GREEDY) for name in "bc"]
    with pytest.raises(QueueFullError, match="2 requests wait, at most 2 may"):
        engine.stream("d", HELLO, GREEDY)
    gate.open()
    for stream in (running, *waiting):
        assert len([delta async for delta in stream]) == 8


async def test_the_queue_is_limited_by_tokens_that_the_engine_has_not_seen_yet(make) -> None:
    gate = Gate()
    engine = make(gate=gate, max_queued_tokens=12, max_num_seqs=1)
    running = engine.stream("a", HELLO, GREEDY)
    await until(lambda: engine.metrics.num_requests_running == 1)
    waiting = [engine.stream(name, HELLO, GREEDY) for name in "bc"]
    with pytest.raises(QueueFullError, match="10 prompt tokens wait, at most 12 may"):
        engine.stream("d", HELLO, GREEDY)
    gate.open()
    for stream in (running, *waiting):
        assert len([delta async for delta in stream]) == 8


async def test_who_was_let_in_is_answered_though_a_preempted_request_has_filled_the_queue(make) -> None:
    gate = Gate()
    engine = make(gate=gate, max_queued_requests=1)
    running = [engine.stream("a", HELLO, GREEDY)]
    await until(lambda: engine.metrics.num_requests_running == 1)
    running.append(engine.stream("b", HELLO, GREEDY))
    gate.permits.release()
    await until(lambda: engine.metrics.num_requests_running == 2)
    with engine._condition:  # as if a step had begun before the engine saw the new one
        engine._commands.append(engine._engine.scheduler._preempt_latest)
        late = engine.stream("c", HELLO, GREEDY)
    gate.open()
    assert [len([delta async for delta in stream]) for stream in (*running, late)] == [8, 8, 8]


async def test_a_grammar_is_compiled_on_the_callers_thread_only(make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    threads = []

    def matcher(compiler: GrammarCompiler, constraint: Constraint) -> None:
        threads.append(threading.current_thread())

    monkeypatch.setattr(GrammarCompiler, "matcher", matcher)
    await collect(engine, "a", SamplingParams(temperature=0, max_tokens=8, constraint=Constraint.regex("a")))
    assert threads == [threading.current_thread()]


async def test_a_cancelled_reader_aborts_its_request(make) -> None:
    gate = Gate()
    engine = make(gate=gate, kv_cache_tokens=4096, max_model_len=4096)
    task = asyncio.create_task(collect(engine, "a", ENDLESS))
    other = asyncio.create_task(collect(engine, "b"))
    await until(lambda: engine.metrics.num_requests_running == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    assert len(await other) == 8
    await until(lambda: is_idle(engine))
    assert engine.metrics.finished_requests == {"stop": 0, "length": 1, "abort": 1, "error": 0}


async def test_cancelling_one_wait_ends_a_stream_that_is_still_held(make) -> None:
    gate = Gate()
    engine = make(gate=gate, kv_cache_tokens=4096, max_model_len=4096)
    stream = engine.stream("a", HELLO, ENDLESS)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(stream), 0.01)
    gate.open()
    await until(lambda: engine.metrics.finished_requests["abort"] == 1)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_break(engine: AsyncEngine) -> None:
    async for _ in engine.stream("a", HELLO, ENDLESS):
        break


async def leave_by_context(engine: AsyncEngine) -> None:
    async with engine.stream("a", HELLO, ENDLESS) as stream:
        await anext(stream)


async def leave_before_reading(engine: AsyncEngine) -> None:
    engine.stream("a", HELLO, ENDLESS)


async def leave_by_aclose(engine: AsyncEngine) -> None:
    stream = engine.stream("a", HELLO, ENDLESS)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_context, leave_before_reading, leave_by_aclose])
async def test_leaving_a_stream_aborts_its_request(make, leave) -> None:
    engine = make(kv_cache_tokens=2**16, max_model_len=2**16)
    await leave(engine)
    gc.collect()
    await until(lambda: engine.metrics.finished_requests["abort"] == 1)
    assert is_idle(engine)


async def test_abort_by_id_ends_the_stream(make) -> None:
    engine = make(kv_cache_tokens=2**16, max_model_len=2**16)
    engine.abort("nobody")
    stream = engine.stream("a", HELLO, ENDLESS)
    await anext(stream)
    await asyncio.to_thread(engine.abort, "a")
    deltas = [delta async for delta in stream]
    assert deltas[-1].finish_reason == "abort" and is_idle(engine)


async def test_a_late_goodbye_does_not_hit_the_next_request_of_that_id(make) -> None:
    gate = Gate()
    engine = make(gate=gate)
    gate.open()
    old = engine.stream("a", HELLO, GREEDY)
    await until(lambda: engine.metrics.finished_requests["length"] == 1)
    await until(lambda: not engine._channels)
    gate.is_open = False
    new = asyncio.create_task(collect(engine, "a"))
    await until(lambda: engine.metrics.num_requests_running == 1)
    old.close()  # its last delta was never read
    gate.open()
    assert (await new)[-1].finish_reason == "length"


def test_a_closed_event_loop_does_not_stop_the_engine(make) -> None:
    gate = Gate()
    engine = make(gate=gate, kv_cache_tokens=2**16, max_model_len=2**16)
    kept = []

    async def start() -> None:
        kept.append(engine.stream("dead", HELLO, ENDLESS))
        await until(lambda: engine.metrics.num_requests_running == 1)

    asyncio.run(start())
    gate.open()
    assert len(asyncio.run(collect(engine, "alive"))) == 8
    asyncio.run(until(lambda: engine.metrics.finished_requests["abort"] == 1))


async def test_one_requests_fault_is_its_own(make) -> None:
    engine = make({"bad": [ord("x"), -1]})
    bad, good = await asyncio.gather(collect(engine, "bad"), collect(engine, "good"))
    assert (bad[-1].finish_reason, good[-1].finish_reason) == ("error", "length")
    assert engine.is_running


async def test_a_failing_step_reaches_its_readers_and_the_engine_goes_on(make) -> None:
    engine = make()
    engine._engine.runner.fail_with = RuntimeError("out of memory")
    (delta,) = await collect(engine, "a")
    assert delta.finish_reason == "error" and "out of memory" in delta.error
    assert len(await collect(engine, "b")) == 8


async def test_a_fault_of_the_engine_itself_reaches_every_stream(make, caplog) -> None:
    gate = Gate()
    engine = make(gate=gate)
    readers = [asyncio.create_task(collect(engine, name)) for name in "abc"]
    await until(lambda: engine.metrics.num_requests_running == 3)

    def broken(plan: object) -> None:
        raise KeyError("a bug")

    engine._engine.scheduler.complete = broken
    gate.open()
    for reader in readers:
        with pytest.raises(EngineDeadError, match="the engine has failed: KeyError"):
            await reader
    assert not engine.is_running and "a bug" in caplog.text
    with pytest.raises(EngineDeadError, match="the engine has failed"):
        engine.stream("d", HELLO, GREEDY)
    engine.abort("a")
    engine.shutdown()


async def test_shutdown_ends_all_streams(make) -> None:
    gate = Gate()
    engine = make(gate=gate, max_num_seqs=1)
    readers = [asyncio.create_task(collect(engine, name, ENDLESS)) for name in "abc"]
    await until(lambda: engine.metrics.num_requests_waiting == 2 and engine.metrics.num_requests_running == 1)
    late = engine.stream("late", HELLO, ENDLESS)  # accepted, but not yet seen by the engine
    stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
    await until(lambda: not engine.is_running)
    gate.open()
    await stopping
    for reader in readers:
        assert (await reader)[-1].finish_reason == "abort"
    assert [delta.finish_reason async for delta in late] == ["abort"]
    assert is_idle(engine)
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.stream("d", HELLO, GREEDY)
    engine.shutdown()
