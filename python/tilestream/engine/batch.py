"""StepPlan -> the tensors of one model step. The only place where the engine builds tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
        logits_rows: [num_logits_rows], int64: tokens whose logits are wanted; None: all of them.
        max_position: the largest of `positions`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    plans: dict[int, AttentionPlan]
    logits_rows: torch.Tensor | None
    max_position: int


class BatchBuilder:
    """Builds StepInputs, each valid until the next. A row of the block table is rewritten when another request gets it,
    else only extended.

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
        self.token_ids = torch.zeros(max_num_tokens, dtype=torch.int64)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.slot_mapping = torch.zeros(max_num_tokens, dtype=torch.int32)
        self.block_table = torch.zeros(max_num_seqs, max_pages_per_seq, dtype=torch.int32)
        self.table = self.block_table.numpy()
        self.rows = [_Row() for _ in range(max_num_seqs)]

    def build(self, step: StepPlan) -> StepInputs:
        """The tensors of `step`, in the order of step.scheduled."""
        # Lists and ranges: a step has few requests, and each numpy call costs more than a request does here.
        page_size = self.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens_q, kv_lens, logits_rows = [0], [], []
        for row, item in zip(self.rows, step.scheduled):
            pages, start = item.request.pages, item.start
            end = start + item.num_new_tokens
            token_ids += item.request.token_ids[start:end]
            positions += range(start, end)
            for index in range(start // page_size, -(-end // page_size)):
                first = index * page_size
                shift = pages[index] * page_size - first
                slots += range(shift + max(start, first), shift + min(end, first + page_size))
            cu_seqlens_q.append(len(token_ids))
            kv_lens.append(end)
            if item.samples:
                logits_rows.append(len(token_ids) - 1)
            if row.pages is not pages or row.num_filled < len(pages):
                self._fill(row, len(kv_lens) - 1, pages)
        cu, kv = torch.tensor(cu_seqlens_q, dtype=torch.int32), torch.tensor(kv_lens, dtype=torch.int32)
        return StepInputs(
            token_ids=_fill_front(self.token_ids, token_ids),
            positions=_fill_front(self.positions, positions),
            slot_mapping=_fill_front(self.slot_mapping, slots),
            block_table=self.block_table[: len(kv_lens)],
            # Shared-prefix jobs hold for layers that see the whole prefix; a window is planned request by request.
            plans={w: p.plan(cu, kv, step.prefix_groups if w < 0 else ()) for w, p in self.planners.items()},
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64) if len(logits_rows) < len(token_ids) else None,
            max_position=max(kv_lens) - 1,
        )

    def _fill(self, row: _Row, index: int, pages: list[int]) -> None:
        """Bring a row of the table up to date with the pages of its request."""
        if row.pages is not pages:  # another request than before, or the same one back from a preemption
            row.pages, row.num_filled = pages, 0
        self.table[index, row.num_filled : len(pages)] = pages[row.num_filled :]
        row.num_filled = len(pages)


@dataclass(slots=True)
class _Row:
    """What a row of the block table holds: the first num_filled of `pages`, a request's own list."""

    pages: list[int] = field(default_factory=list)
    num_filled: int = 0


def _fill_front(buffer: torch.Tensor, values: list[int]) -> torch.Tensor:
    front = buffer[: len(values)]
    front.numpy()[:] = values
    return front


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


class SamplingBuilder:
    """Builds SamplingInputs, each valid until the next. While the same requests are sampled, only what changes is new."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._inputs: SamplingInputs | None = None

    def build(self, requests: list[Request]) -> SamplingInputs:
        """Tensors for the rows that are sampled in this step, one per request."""
        if self._inputs is None or requests != self._requests:
            self._requests, self._inputs = requests, build_sampling_inputs(requests)
            return self._inputs
        self._inputs.positions.numpy()[:] = [request.num_tokens for request in requests]
        if self._inputs.penalties is None:
            return self._inputs
        return replace(self._inputs, penalties=_penalties(requests))


def build_sampling_inputs(requests: Sequence[Request]) -> SamplingInputs:
    """The tensors of these requests, from nothing."""
    params = [request.params for request in requests]
    floats = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
    temperature, top_p, min_p = torch.tensor(floats, dtype=torch.float32).unbind()
    integers = [[request.seed for request in requests], [request.num_tokens for request in requests]]
    seeds, positions = torch.tensor(integers, dtype=torch.int64).unbind()
    return SamplingInputs(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int32),
        seeds=seeds,
        positions=positions,
        penalties=_penalties(requests),
        num_top_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
    )


def _penalties(requests: Sequence[Request]) -> Penalties | None:
    if not any(r.params.has_penalties for r in requests):
        return None
    values = [
        (r.params.repetition_penalty, r.params.presence_penalty, r.params.frequency_penalty) for r in requests
    ]
    history: list[int] = []
    indptr = [0]
    for request in requests:
        if request.params.has_penalties:  # others need no history
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
