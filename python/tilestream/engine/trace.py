"""A trace of the engine, for chrome://tracing and ui.perfetto.dev: its steps, and its requests from queue to end.

The file is Chrome's JSON array of events, one a line. Lines are written whole and at once, so that a file of a process
that was killed can be read as well: readers do not ask for the closing bracket. No text of a request is in it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from tilestream.engine.metrics import StepRecord
from tilestream.engine.request import FinishReason, Request

logger = logging.getLogger("tilestream.engine")

Event = dict[str, Any]
_STEP_ROW, _OP_ROW, _KERNEL_ROW = 1, 2, 3  # "threads" of the picture


class KernelSource(Protocol):
    """What tells of kernels: tilestream.kernel_trace.KernelProfiler."""

    def after_step(self) -> list[tuple[str, float, float, bool]]: ...


class Trace:
    """An open trace file. Its methods are called by the engine's thread alone.

    Args:
        path: of the file; an old one is replaced.
    Attributes:
        kernels: asked after each step, if there is one.
    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.kernels: KernelSource | None = None
        self._file = Path(path).open("wb", buffering=0)
        self._begin_s = time.monotonic()
        self._file.write(b"[\n")
        started = datetime.now(timezone.utc).isoformat()
        self._write(
            _meta("process_name", 0, f"tilestream, from {started}"),
            _meta("thread_name", _STEP_ROW, "engine steps"),
            _meta("thread_name", _OP_ROW, "ops on the host"),
            _meta("thread_name", _KERNEL_ROW, "kernels on the device"),
        )

    def step(self, step: StepRecord) -> None:
        """A step: its parts, its tokens, and counters beside it."""
        counts = {"prefill_tokens": step.prefill_tokens, "decode_tokens": step.decode_tokens}
        facts = counts | {"budget_tokens": step.budget_tokens, "step": step.index}
        self._write(
            self._span("step", step.begin_s, step.end_s, facts),
            *(self._span(*part) for part in step.spans),
            self._counter("tokens", step.begin_s, counts),
            self._counter("requests", step.begin_s, {"running": step.num_running, "waiting": step.num_waiting}),
            self._counter("kv_cache", step.begin_s, {"usage": round(step.kv_cache_usage, 4)}),
        )
        if self.kernels is not None and (found := self.kernels.after_step()):
            rows = (_OP_ROW, _KERNEL_ROW)
            self._write(*(self._span(name, begin_s, end_s, row=rows[device]) for name, begin_s, end_s, device in found))

    def request(self, request: Request, reason: FinishReason) -> None:
        """A request that has ended: how long it waited, read its prompt, and wrote."""
        end_s = time.monotonic()
        facts = {
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": request.num_cached_tokens or 0,
            "output_tokens": request.num_output_tokens,
            "priority": request.options.priority,
            "tenant": request.options.tenant,
            "finish_reason": reason,
        }
        phases = [("request", request.arrival_s, end_s, facts)]
        borders = [request.arrival_s, request.first_scheduled_s, request.first_token_s]
        reached = [border for border in borders if border is not None] + [end_s]
        for name, begin_s, phase_end_s in zip(("queued", "prefill", "decode"), reached, reached[1:], strict=False):
            phases.append((name, begin_s, phase_end_s, {}))
        events = []
        for name, begin_s, phase_end_s, arguments in phases:
            event = {"cat": "request", "id": request.request_id, "name": name, "pid": 0, "tid": 0}
            events.append(event | {"ph": "b", "ts": self._us(begin_s), "args": arguments})
            events.append(event | {"ph": "e", "ts": self._us(phase_end_s)})
        self._write(*events)

    def _span(
        self, name: str, begin_s: float, end_s: float, arguments: Event | None = None, row: int = _STEP_ROW
    ) -> Event:
        event = {"ph": "X", "name": name, "pid": 0, "tid": row, "ts": self._us(begin_s)}
        return event | {"dur": round(1e6 * (end_s - begin_s), 3), "args": arguments or {}}

    def close(self) -> None:
        """Write the closing bracket."""
        if not self._file.closed:
            now_us = self._us(time.monotonic())
            self._write({"ph": "i", "name": "end of the trace", "s": "g", "pid": 0, "tid": 0, "ts": now_us}, last=True)
            self._file.close()

    def _counter(self, name: str, at_s: float, values: Event) -> Event:
        return {"ph": "C", "name": name, "pid": 0, "ts": self._us(at_s), "args": values}

    def _us(self, at_s: float) -> float:
        return round(1e6 * (at_s - self._begin_s), 3)

    def _write(self, *events: Event, last: bool = False) -> None:
        """All in one write: a kill in between leaves whole lines. A full disk ends the trace, not the engine."""
        if self._file.closed:
            return
        lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        try:
            self._file.write((lines + ("\n]\n" if last else ",\n")).encode())
        except OSError as error:
            logger.error("the trace ends here, it cannot be written: %s", error)
            self._file.close()


def _meta(name: str, row: int, value: str) -> Event:
    return {"ph": "M", "name": name, "pid": 0, "tid": row, "args": {"name": value}}
