"""Decode steps without Python per layer: the layers' launches are recorded once and replayed.

What CUDA graphs are to a GPU. It works because a step's inputs, activations and cache stay where they are and only
their contents change; a step whose buffers have moved is recorded again.
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


class LayerPrograms:
    """One recorded program per number of tokens, with or without the projection to logits.

    A replay makes none of the ops' checks again: what they check of shapes is part of the key, and what they check of
    indices (page ids, slots, positions) is the engine's own.
    """

    def __init__(self) -> None:
        self._programs: dict[tuple[int, bool], tuple[tuple, tuple, _C.Program]] = {}

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
        key = buffers_of(buf, step, kv_caches, logits)
        known = self._programs.get(kind)
        if known is not None and known[0] == key:
            known[2].run()
            return
        if len(self._programs) >= _MAX_PROGRAMS:
            self.clear()
        program = _C.Program()
        program.begin()
        try:
            run_layers(buf, step, kv_caches, logits)
        finally:
            program.end()
        self._programs[kind] = (key, (buf, step, kv_caches, logits), program)  # keeps the buffers alive


def buffers_of(buf: Scratch, step: StepInputs, kv_caches: Sequence[KvCache], logits: torch.Tensor) -> tuple:
    """Where everything is that a recorded launch points into."""
    plans = tuple((w, p.plan.data_ptr(), p.workspace.data_ptr()) for w, p in step.plans.items())
    table = step.block_table
    return (
        buf.x.data_ptr(), step.positions.data_ptr(), step.slot_mapping.data_ptr(), table.data_ptr(), table.stride(0),
        plans, id(kv_caches), logits.data_ptr() if step.logits_rows is None else 0,
    )  # fmt: skip
