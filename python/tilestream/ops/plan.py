"""Plans: one step's attention work as a stream of tiles, dealt to workers (csrc/include/tilestream/plan.h)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tilestream._native import _C
from tilestream.ops.memory import Upload

logger = logging.getLogger("tilestream.ops")

_NUM_PARTIAL_ROWS = 18  # position of PlanHeader::num_partial_rows (plan.h), in int32


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A plan and the workspace its partial results need.

    Args:
        plan: int32, 1-D, the packed plan (layout in plan.h), where the kernel reads it.
        host_plan: the same in host memory, which the op's checks read; on the CPU the same tensor.
        workspace: float32, 1-D, room for the plan's partial rows.
        fixed: the planner's next plans stay at these addresses, as a captured CUDA graph needs it.
    """

    plan: torch.Tensor
    host_plan: torch.Tensor
    workspace: torch.Tensor
    fixed: bool = False


class AttentionPlanner:
    """Makes the plans of successive steps; keeps and reuses its buffers, so a plan is valid until the next one.

    Args:
        num_qo_heads, num_kv_heads: heads; num_qo_heads must be a multiple of num_kv_heads.
        head_dim_vo: elements of one output head (sizes the workspace).
        head_dim_qk: elements of one q and K head; default: head_dim_vo. On CUDA the kernel's tiles depend on it.
        page_size: tokens per page: 16, 32 or 64.
        num_workers: workers the tiles are dealt to; default: the device's (CPU: threads; CUDA: the blocks that its SMs hold).
        device: where the attention runs: "cpu", "cuda", "cuda:1".
        kv_dtype: of the cache, on CUDA: there its kernels differ in tiles and blocks.
        causal: a query sees keys up to its own position (bottom-right aligned).
        window_left: -1: off; otherwise keys at distance 0..window_left are seen.
        batch_invariant: cut only at multiples of `split_tokens`, so that a request's result is bitwise the same
            whatever else is in the batch and however its prompt was chunked.
        tile_rows, tile_keys, split_tokens, cost_tile, cost_row: see plan.h. The defaults are the device's.
        narrow_rows: units of at most so many rows get lists of jobs of their own, for kernels that run them beside the
            others; 0: no such lists. None: as the device's kernels take it. Ignored when batch_invariant.
        num_taken_sms: of a GPU, that other kernels have meanwhile; the default num_workers leaves them out.
        merge_inside: add what kernels need that merge partial results in the launch that computes them. None: as the
            device's kernels take it.
    Raises:
        ValueError: a size that the planner does not take, with the value and what is allowed.
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_vo: int,
        *,
        head_dim_qk: int | None = None,
        page_size: int = 16,
        num_workers: int | None = None,
        causal: bool = True,
        window_left: int = -1,
        batch_invariant: bool = False,
        device: torch.device | str = "cpu",
        kv_dtype: str = "bfloat16",
        tile_rows: int | None = None,
        tile_keys: int | None = None,
        split_tokens: int = 1024,
        cost_tile: int | None = None,
        cost_row: int | None = None,
        narrow_rows: int | None = None,
        num_taken_sms: int = 0,
        merge_inside: bool | None = None,
    ) -> None:
        device = torch.device(device)
        if device.type == "cpu":
            default = _cpu_shares()
        else:
            default = _cuda_shares(device, head_dim_qk or head_dim_vo, head_dim_vo, kv_dtype, num_taken_sms)
        group_size = max(1, num_qo_heads // max(1, num_kv_heads))
        self.row_floats = group_size * (head_dim_vo + 1)
        self.planner = _C.Planner(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
            num_workers=default.num_workers if num_workers is None else num_workers,
            tile_rows=max(default.tile_rows, group_size) if tile_rows is None else tile_rows,
            tile_keys=default.tile_keys if tile_keys is None else tile_keys,
            split_tokens=split_tokens,
            window_left=window_left,
            causal=causal,
            batch_invariant=batch_invariant,
            cost_tile=default.cost_tile if cost_tile is None else cost_tile,
            cost_row=default.cost_row if cost_row is None else cost_row,
            narrow_rows=default.narrow_rows if narrow_rows is None else narrow_rows,
            merge_inside=default.merge_inside if merge_inside is None else merge_inside,
        )
        self.workspace = torch.empty(0, device=device)
        self._upload = Upload(torch.int32, device)
        self._reserved: tuple[int, int] | None = None  # int32 of a plan, floats of workspace

    def reserve(
        self,
        cu_seqlens_q: torch.Tensor,
        kv_lens: torch.Tensor,
        prefix_groups: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        """Fix the buffers of all plans to come, with room for this step: what a CUDA graph captures must not move.

        Args:
            cu_seqlens_q, kv_lens, prefix_groups: as plan(), of the largest step.
        Returns:
            None.
        Raises:
            ValueError: as plan().
        """
        num_int32, num_rows = self.planner.measure(cu_seqlens_q.numpy(), kv_lens.numpy(), list(prefix_groups))
        self._upload.reserve(num_int32)
        self.workspace = torch.empty(num_rows * self.row_floats, device=self.workspace.device)
        self._reserved = num_int32, self.workspace.numel()

    def plan(
        self,
        cu_seqlens_q: torch.Tensor,
        kv_lens: torch.Tensor,
        prefix_groups: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> AttentionPlan:
        """The plan of one step.

        Args:
            cu_seqlens_q: [batch_size + 1], int32, CPU: prefix sums of the query lengths, from 0.
            kv_lens: [batch_size] or [batch_size, num_kv_heads], int32, CPU: KV tokens, this step's own included.
            prefix_groups: (prefix_tokens, request indices) of requests that hold the same first pages.
        Returns:
            The plan, valid until the next call on this planner.
        Raises:
            ValueError: lengths that do not fit together, or a step larger than the one that was reserved, with the values.
            RuntimeError: a CUDA graph is being captured: a graph holds where plans lie, not what they say.
        """
        if self.workspace.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("plan() was called in a CUDA graph capture; plan before it, and again before each replay")
        plan = torch.from_numpy(self.planner.plan(cu_seqlens_q.numpy(), kv_lens.numpy(), list(prefix_groups)))
        need = int(plan[_NUM_PARTIAL_ROWS]) * self.row_floats
        if self._reserved is not None and (plan.numel() > self._reserved[0] or need > self._reserved[1]):
            raise ValueError(
                f"this step's plan takes {plan.numel()} int32 and {need} floats of workspace; reserve() made room for "
                f"{self._reserved[0]} and {self._reserved[1]}: reserve for a larger step"
            )
        if self.workspace.numel() < need:
            self.workspace = self.workspace.new_empty(need)
        return AttentionPlan(self._upload(plan), plan, self.workspace, self._reserved is not None)


class _Shares(NamedTuple):
    """How the work of a step is cut for a device."""

    num_workers: int
    tile_rows: int
    tile_keys: int
    narrow_rows: int = 0
    merge_inside: bool = False
    cost_tile: int = 4
    cost_row: int = 1


def _cpu_shares() -> _Shares:
    return _Shares(_C.num_threads(), tile_rows=96, tile_keys=128)


def _cuda_shares(
    device: torch.device, head_dim_qk: int, head_dim_vo: int, kv_dtype: str, num_taken_sms: int = 0
) -> _Shares:
    properties = torch.cuda.get_device_properties(device)
    num_sms = max(1, properties.multi_processor_count - num_taken_sms)
    if properties.major == 9 and "90a-real" not in _C.cuda_archs:
        _warn_of_missing_sm90(properties.name)
    elif properties.major == 9 and (tile := _C.attention_tile(kv_dtype, head_dim_qk, head_dim_vo)):
        return sm90_shares(num_sms, tile)
    # As MmaConfig of csrc/cuda/attention_config.cuh has it: what an SM holds, and the rows of a tile.
    unpacked, wide = kv_dtype in ("fp8", "int8", "int4"), max(head_dim_qk, head_dim_vo) > 128
    return _Shares(num_sms * (3 if unpacked and not wide else 2), tile_rows=64 if unpacked or wide else 128, tile_keys=64)


@functools.cache
def _warn_of_missing_sm90(gpu: str) -> None:
    logger.warning(
        "%s: this build is for %s, without Hopper's own attention; slower kernels run. Build with TORCH_CUDA_ARCH_LIST=9.0a",
        gpu, _C.cuda_archs,
    )  # fmt: skip


def sm90_shares(num_sms: int, tile: _C.AttentionTile) -> _Shares:
    """For the Hopper kernel: a block on each SM, whose tiles take the same time however many of their rows are in use. Cut
    every 64 keys, also where the wide lane's tiles have 128, for short decodes to reach all SMs."""
    return _Shares(num_sms, tile.wide_rows, 64, tile.narrow_rows, merge_inside=True, cost_tile=1, cost_row=0)
