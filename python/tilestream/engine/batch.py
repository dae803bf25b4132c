"""StepPlan -> the tensors of one model step. The only place where the engine builds tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tilestream.engine.request import Request
from tilestream.engine.scheduler import StepPlan
from tilestream.ops import AttentionPlan, AttentionPlanner, Penalties


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a model needs of one step. The tensors are views of buffers that stay where they are from step to step.

    Args:
        token_ids: [num_tokens], int64.
        positions, slot_mapping: [num_tokens], int32.
        block_table: [batch_size, max_pages_per_seq], int32.
        plans: the attention plan by window_left (-1: no window).
        logits_rows: [num_logits_rows], int64: tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    plans: dict[int, AttentionPlan]
    logits_rows: torch.Tensor


class BatchBuilder:
    """Builds StepInputs, each valid until the next. Block-table rows of running requests are kept and only extended.

    Args:
        planners: one AttentionPlanner per window_left that the model's layers use.
        page_size: tokens per page.
        max_pages_per_seq: pages of the longest request.
        max_num_seqs: most requests of one step.
        max_num_tokens: most tokens of one step.
    """

    def __init__(
        self,
        planners: dict[int, AttentionPlanner],
        *,
        page_size: int,
        max_pages_per_seq: int,
        max_num_seqs: int,
        max_num_tokens: int,
    ) -> None:
        self.planners = planners
        self.page_size = page_size
        # Twice as many rows as can run: those of finished requests are dropped many at a time.
        self.table = np.zeros((2 * max_num_seqs, max_pages_per_seq), dtype=np.int32)
        self.free_rows = list(range(len(self.table) - 1, -1, -1))
        self.rows: dict[str, _Row] = {}
        self.token_ids = torch.zeros(max_num_tokens, dtype=torch.int64)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.slot_mapping = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.block_table = torch.zeros(max_num_seqs, max_pages_per_seq, dtype=torch.int32)

    def build(self, step: StepPlan) -> StepInputs:
        """The tensors of `step`, in the order of step.scheduled."""
        items = step.scheduled
        lengths = np.fromiter((item.num_new_tokens for item in items), np.int32, len(items))
        starts = np.fromiter((item.start for item in items), np.int32, len(items))
        cu_seqlens_q = np.zeros(len(items) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        kv_lens = starts + lengths

        new_tokens: list[int] = []
        for item in items:
            new_tokens += item.request.token_ids[item.start : item.start + item.num_new_tokens]
        num_tokens = len(new_tokens)
        token_ids, positions, slot_mapping = (
            buffer[:num_tokens] for buffer in (self.token_ids, self.positions, self.slot_mapping)
        )
        token_ids.numpy()[:] = new_tokens
        request_of = np.repeat(np.arange(len(items), dtype=np.int32), lengths)
        position_of = np.arange(num_tokens, dtype=np.int32) + (starts - cu_seqlens_q[:-1])[request_of]
        positions.numpy()[:] = position_of

        max_pages = int(kv_lens.max() + self.page_size - 1) // self.page_size
        block_table = self.block_table[: len(items), :max_pages]
        rows = self.table[self._table_rows([item.request for item in items]), :max_pages]
        block_table.numpy()[:] = rows
        pages = rows[request_of, position_of // self.page_size]
        slot_mapping.numpy()[:] = pages * self.page_size + position_of % self.page_size

        samples = np.fromiter((item.samples for item in items), np.bool_, len(items))
        cu, kv = torch.from_numpy(cu_seqlens_q), torch.from_numpy(kv_lens)
        # Shared-prefix jobs hold for layers that see the whole prefix; a window is planned request by request.
        plans = {w: planner.plan(cu, kv, step.prefix_groups if w < 0 else ()) for w, planner in self.planners.items()}
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            block_table=block_table,
            plans=plans,
            logits_rows=torch.from_numpy((cu_seqlens_q[1:] - 1)[samples].astype(np.int64)),
        )

    def _table_rows(self, requests: list[Request]) -> list[int]:
        """Rows of self.table for the step's requests, brought up to date with their pages."""
        if len(self.rows) + len(requests) > len(self.table):
            self._drop_rows_except({request.request_id for request in requests})
        indices = []
        for request in requests:
            row = self.rows.get(request.request_id)
            if row is None or row.pages is not request.pages:  # new, or back from a preemption
                index = row.index if row is not None else self.free_rows.pop()
                row = self.rows[request.request_id] = _Row(index, request.pages)
            if row.num_filled < len(request.pages):
                self.table[row.index, row.num_filled : len(request.pages)] = request.pages[row.num_filled :]
                row.num_filled = len(request.pages)
            indices.append(row.index)
        return indices

    def _drop_rows_except(self, running: set[str]) -> None:
        for request_id in [r for r in self.rows if r not in running]:
            self.free_rows.append(self.rows.pop(request_id).index)


@dataclass(slots=True)
class _Row:
    index: int
    pages: list[int]  # the request's own list: its identity tells whether the pages are still the same
    num_filled: int = 0


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Per-row sampling parameters of one step, as tensors (tilestream.ops.sample)."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    penalties: Penalties | None
    num_top_logprobs: int | None


def build_sampling_inputs(requests: Sequence[Request]) -> SamplingInputs:
    """Tensors for the rows that are sampled in this step, one per request."""
    params = [request.params for request in requests]
    floats = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], dtype=torch.float32).T.contiguous()
    return SamplingInputs(
        temperature=floats[0],
        top_p=floats[1],
        min_p=floats[2],
        top_k=torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int32),
        seeds=torch.tensor([request.seed for request in requests], dtype=torch.int64),
        positions=torch.tensor([request.num_tokens for request in requests], dtype=torch.int64),
        penalties=_penalties(requests),
        num_top_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
    )


def _penalties(requests: Sequence[Request]) -> Penalties | None:
    values = [
        (r.params.repetition_penalty, r.params.presence_penalty, r.params.frequency_penalty) for r in requests
    ]
    if all(v == (1.0, 0.0, 0.0) for v in values):
        return None
    history: list[int] = []
    indptr = [0]
    for request, v in zip(requests, values, strict=True):
        if v != (1.0, 0.0, 0.0):  # others need no history
            history += request.token_ids
        indptr.append(len(history))
    repetition, presence, frequency = torch.tensor(values, dtype=torch.float32).T.contiguous()
    return Penalties(
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        history=torch.tensor(history, dtype=torch.int32),
        history_indptr=torch.tensor(indptr, dtype=torch.int32),
        history_prompt_len=torch.tensor([request.num_prompt_tokens for request in requests], dtype=torch.int32),
    )
