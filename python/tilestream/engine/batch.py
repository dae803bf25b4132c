"""StepPlan -> the tensors of one model step. The only place where the engine builds tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tilestream.engine.config import EngineConfig
from tilestream.engine.request import Request
from tilestream.engine.step_plan import StepPlan
from tilestream.ops import AttentionPlan, AttentionPlanner, Penalties
from tilestream.ops.memory import Upload
from tilestream.placement import CPU, Placement


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a model needs of one step. The tensors are views of buffers that stay where they are from step to step.

    Args:
        token_ids: [num_tokens], int64; -1 - i: the token that row i of the step before drew.
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
        placement: where the tensors go. An asynchronous one gets decode steps of few sizes: the tokens past the real ones
            have slot -1, and nothing of theirs is kept.
    """

    def __init__(
        self,
        planners: dict[int, AttentionPlanner],
        *,
        page_size: int,
        max_pages_per_seq: int,
        max_num_seqs: int,
        max_num_tokens: int,
        placement: Placement = CPU,
    ) -> None:
        self.planners = planners
        self.page_size = page_size
        self.pads = placement.asynchronous
        max_num_tokens = max(max_num_tokens, padded_decodes(max_num_seqs))
        self.token_ids = _StepTensor(max_num_tokens, torch.int64, placement.device)
        self.positions = _StepTensor(max_num_tokens, torch.int32, placement.device)
        self.slot_mapping = _StepTensor(max_num_tokens, torch.int32, placement.device)
        self.block_table = _StepTensor(max_num_seqs * max_pages_per_seq, torch.int32, placement.device)
        self.table = self.block_table.host.view(max_num_seqs, max_pages_per_seq).numpy()
        self.device = placement.device
        self.rows = [_Row() for _ in range(max_num_seqs)]

    @staticmethod
    def of(model, config: EngineConfig, kv_dtype: str, *, num_taken_sms: int = 0) -> BatchBuilder:
        """For a model and its engine's limits; num_taken_sms: of a GPU, that other kernels have meanwhile."""
        m, placement = model.config, model.placement
        planners = {
            window_left: AttentionPlanner(
                m.num_qo_heads,
                m.num_kv_heads,
                m.head_dim,
                page_size=config.page_size,
                window_left=window_left,
                batch_invariant=config.batch_invariant,
                device=placement.device,
                kv_dtype=kv_dtype,
                num_taken_sms=num_taken_sms,
            )
            for window_left in sorted(set(m.window_left))
        }
        return BatchBuilder(
            planners,
            page_size=config.page_size,
            max_pages_per_seq=-(-config.max_request_tokens // config.page_size),
            max_num_seqs=config.max_running_requests,
            max_num_tokens=config.token_budget,
            placement=placement,
        )

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
        num_tokens, batch_size = len(token_ids), len(kv_lens)
        if self.pads and len(logits_rows) == num_tokens:
            num_padding = padded_decodes(num_tokens) - num_tokens
            token_ids += [0] * num_padding
            positions += [0] * num_padding
            slots += [-1] * num_padding
        cu, kv = torch.tensor(cu_seqlens_q, dtype=torch.int32), torch.tensor(kv_lens, dtype=torch.int32)
        return StepInputs(
            token_ids=self.token_ids.fill(token_ids),
            positions=self.positions.fill(positions),
            slot_mapping=self.slot_mapping.fill(slots),
            block_table=self.block_table.front(batch_size * self.table.shape[1]).view(batch_size, -1),
            # Shared-prefix jobs hold for layers that see the whole prefix; a window is planned request by request.
            plans={w: p.plan(cu, kv, step.prefix_groups if w < 0 else ()) for w, p in self.planners.items()},
            logits_rows=_on(self.device, logits_rows, torch.int64) if len(logits_rows) < num_tokens else None,
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


class _StepTensor:
    """A buffer in host memory that is filled anew every step, and its place on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros(size, dtype=dtype)
        self._upload = Upload(dtype, device)
        self._upload.reserve(size)

    def fill(self, values: list[int]) -> torch.Tensor:
        """These values on the device."""
        self.host[: len(values)].numpy()[:] = values
        return self.front(len(values))

    def front(self, num: int) -> torch.Tensor:
        """The first `num` values on the device."""
        return self._upload(self.host[:num])


def _on(device: torch.device, values: Sequence, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these values on a device, without waiting for what runs there."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def padded_decodes(num_tokens: int) -> int:
    """The number of tokens that a decode step is padded to: a graph is captured for each, so there are few."""
    if num_tokens <= 8:
        return 1 << (num_tokens - 1).bit_length() if num_tokens > 0 else 0
    step = 8 if num_tokens <= 64 else 16
    return -(-num_tokens // step) * step


def largest_step(token_budget: int, max_num_seqs: int) -> int:
    """Tokens of the largest step of an engine with these limits, padding included."""
    return max(token_budget, padded_decodes(min(token_budget, max_num_seqs)))


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
    """Builds SamplingInputs, each valid until the next. While the same requests are sampled, only what changes is new.

    Args:
        device: where the tensors go.
    """

    def __init__(self, device: torch.device = CPU.device) -> None:
        self._device = device
        self._upload = Upload(torch.int64, device)
        self._requests: list[Request] = []
        self._inputs: SamplingInputs | None = None

    def build(self, requests: list[Request]) -> SamplingInputs:
        """Tensors for the rows that are sampled in this step, one per request."""
        if self._inputs is None or requests != self._requests:
            self._requests, self._inputs = requests, build_sampling_inputs(requests, self._device)
            return self._inputs
        positions = self._upload(torch.tensor([request.num_tokens for request in requests]))
        return replace(self._inputs, positions=positions, penalties=_penalties(requests, self._device))


def build_sampling_inputs(requests: Sequence[Request], device: torch.device) -> SamplingInputs:
    """The tensors of these requests, from nothing."""
    params = [request.params for request in requests]
    floats = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
    temperature, top_p, min_p = _on(device, floats, torch.float32).unbind()
    integers = [[request.seed for request in requests], [request.num_tokens for request in requests]]
    seeds, positions = _on(device, integers, torch.int64).unbind()
    return SamplingInputs(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=_on(device, [max(p.top_k, 0) for p in params], torch.int32),
        seeds=seeds,
        positions=positions,
        penalties=_penalties(requests, device),
        num_top_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
    )


def _penalties(requests: Sequence[Request], device: torch.device) -> Penalties | None:
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
    repetition, presence, frequency = _on(device, list(zip(*values, strict=True)), torch.float32)
    return Penalties(
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        history=_on(device, history, torch.int32),
        history_indptr=_on(device, indptr, torch.int32),
        history_prompt_len=_on(device, [r.num_prompt_tokens for r in requests], torch.int32),
    )
