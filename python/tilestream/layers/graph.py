"""Decode steps as CUDA graphs: a few hundred launches by one call of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tilestream.layers.program import buffers_of
from tilestream.layers.scratch import Scratch
from tilestream.ops.kv_cache import KvCache

if TYPE_CHECKING:
    from tilestream.engine.batch import StepInputs


class LayerGraphs:
    """One captured graph per (padded) number of tokens, with or without the projection to logits.

    As LayerPrograms on a CPU: lengths, pages and plans are read from buffers that stay where they are, so a graph replays
    with other ones, and a step whose buffers have moved is captured again. The first step of a size runs as it is, which also
    loads its kernels, and is captured afterwards; all graphs share one memory pool, for they never run at the same time.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, bool], tuple[tuple, tuple, torch.cuda.CUDAGraph]] = {}
        self._pool: tuple[int, int] | None = None

    def clear(self) -> None:
        self._graphs.clear()

    def run(
        self,
        run_layers: Callable[..., None],
        buf: Scratch,
        step: StepInputs,
        kv_caches: Sequence[KvCache],
        logits: torch.Tensor,
    ) -> None:
        """run_layers(buf, step, kv_caches, logits), replayed where this step's buffers are those of a captured one."""
        kind = (step.token_ids.size(0), step.logits_rows is None)
        key = buffers_of(buf, step, kv_caches, logits)
        known = self._graphs.get(kind)
        if known is not None and known[0] == key:
            known[2].replay()
            return
        run_layers(buf, step, kv_caches, logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run_layers(buf, step, kv_caches, logits)
        self._pool = graph.pool()
        self._graphs[kind] = (key, (buf, step, kv_caches, logits), graph)  # keeps the buffers alive
