"""Decode steps without Python per layer: the layers' launches are recorded once and replayed.

It works because a step's inputs, activations and cache stay where they are and only their contents change (lengths, pages and
plans too are read from buffers); a step whose buffers have moved is recorded again. What a recording is depends on the device:
a program of launches on a CPU, a CUDA graph on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tilestream._native import _C
from tilestream.layers.scratch import Scratch
from tilestream.ops.kv_cache import KvCache

if TYPE_CHECKING:
    from tilestream.engine.batch import StepInputs

_MAX_PROGRAMS = 64  # most of them one per number of tokens; about 100 KB each for 30 layers

Record = Callable[[Callable[[], None]], Callable[[], None]]  # runs what it is given, and returns what runs it again


class LayerPrograms:
    """One recording per number of tokens, with or without the projection to logits.

    A replay makes none of the ops' checks again: what they check of shapes is part of the key, and what they check of
    indices (page ids, slots, positions) is the engine's own.

    Args:
        device: where the layers run.
    """

    def __init__(self, device: torch.device) -> None:
        self._record: Record = record_program if device.type == "cpu" else GraphRecorder()
        self._programs: dict[tuple[int, bool], tuple[tuple, tuple, Callable[[], None]]] = {}

    def clear(self) -> None:
        self._programs.clear()

    def run(
        self,
        run_layers: Callable[..., None],
        buf: Scratch,
        step: StepInputs,
        kv_caches: Sequence[KvCache],
        logits: torch.Tensor,
    ) -> None:
        """run_layers(buf, step, kv_caches, logits), replayed where this step's buffers are those of a recorded one."""
        kind = (step.token_ids.size(0), step.logits_rows is None)
        key = _key(buf, step, kv_caches, logits)
        known = self._programs.get(kind)
        if known is not None and known[0] == key:
            known[2]()
            return
        if len(self._programs) >= _MAX_PROGRAMS:
            self.clear()
        buffers = (buf, step, kv_caches, logits)
        self._programs[kind] = (key, buffers, self._record(lambda: run_layers(*buffers)))  # keeps the buffers alive


def record_program(run: Callable[[], None]) -> Callable[[], None]:
    """On a CPU: our ops' launches, without torch (csrc/api/program.h). Anything else that `run` does is not replayed."""
    program = _C.Program()
    program.begin()
    try:
        run()
    finally:
        program.end()
    return program.run


class GraphRecorder:
    """On a GPU: a CUDA graph. The first run also loads the kernels; the capture after it computes nothing. All graphs share
    one memory pool, for they never run at the same time."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        return graph.replay


def _key(buf: Scratch, step: StepInputs, kv_caches: Sequence[KvCache], logits: torch.Tensor) -> tuple:
    """Where everything is that a recorded launch points into."""
    plans = tuple((w, p.plan.data_ptr(), p.workspace.data_ptr()) for w, p in step.plans.items())
    table = step.block_table
    return (
        buf.x.data_ptr(), buf.qkv.data_ptr(), step.positions.data_ptr(), step.slot_mapping.data_ptr(), table.data_ptr(),
        table.stride(0), plans, id(kv_caches), logits.data_ptr() if step.logits_rows is None else 0,
    )  # fmt: skip
