"""A plan as Python objects, and the brute-force check that it covers the mask.

Shares nothing with the planner but the layout that csrc/include/tilestream/plan.h describes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PLAN_MAGIC = 0x54535031
ALL_VISIBLE = 1 << 30
_HEADER_FIELDS = (
    "magic total_int32 batch_size num_tokens num_qo_heads num_kv_heads page_size num_workers tile_rows tile_keys "
    "causal window_left lists_per_head num_groups max_kv_len num_jobs num_merges num_merge_parts num_partial_rows "
    "num_q_rows q_rows_offset jobs_offset worker_begin_offset merges_offset merge_parts_offset mode cost_tile cost_row "
    "num_narrow_workers merge_of_row_offset merge_counters_offset"
).split()


@dataclass(frozen=True)
class Job:
    """Query tokens `tokens` of one kv head against keys kv_begin..kv_end of one page list."""

    tokens: tuple[int, ...]
    kv_head: int
    page_list: int
    kv_begin: int
    kv_end: int
    q_pos_begin: int
    partial_begin: int

    @property
    def is_prefix(self) -> bool:
        return self.q_pos_begin == ALL_VISIBLE

    @property
    def is_final(self) -> bool:
        """Whether the job writes the output itself, with nothing to merge."""
        return self.partial_begin < 0

    def sees(self, plan: Plan, i: int) -> range:
        """The keys that the job's token i attends to, as a range."""
        begin, end = self.kv_begin, self.kv_end
        if not self.is_prefix:
            position = self.q_pos_begin + i
            if plan.causal:
                end = min(end, position + 1)
            if plan.window_left >= 0:
                begin = max(begin, position - plan.window_left)
        return range(begin, max(begin, end))


@dataclass(frozen=True)
class Merge:
    """The partial rows that make up the output of one token and kv head, in merging order."""

    token: int
    kv_head: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A decoded plan; the names are those of plan.h."""

    batch_size: int
    num_tokens: int
    num_qo_heads: int
    num_kv_heads: int
    page_size: int
    tile_rows: int
    tile_keys: int
    causal: bool
    window_left: int
    lists_per_head: bool
    num_groups: int
    max_kv_len: int
    num_partial_rows: int
    batch_invariant: bool
    cost_tile: int
    cost_row: int
    num_narrow_workers: int
    jobs: tuple[Job, ...]
    worker_begin: tuple[int, ...]
    merges: tuple[Merge, ...]
    merge_of_row: tuple[int, ...] | None
    merge_counters: tuple[int, ...] | None

    @property
    def num_workers(self) -> int:
        return len(self.worker_begin) - 1

    @property
    def kinds(self) -> tuple[range, ...]:
        """The workers that share one stream of tiles: all, or the wide and the narrow ones."""
        wide = self.num_workers - self.num_narrow_workers
        return (range(wide), range(wide, self.num_workers)) if self.num_narrow_workers else (range(wide),)

    def num_tiles(self, job: Job) -> int:
        return -(-(job.kv_end - job.kv_begin) // self.tile_keys)

    def cost(self, job: Job) -> int:
        rows = len(job.tokens) * (self.num_qo_heads // self.num_kv_heads)
        return self.num_tiles(job) * (self.cost_tile + self.cost_row * rows)

    def request_of(self, job: Job) -> int:
        """The request whose page list the job reads (of a prefix job: the group's first)."""
        return job.page_list // self.num_kv_heads if self.lists_per_head else job.page_list

    def worker_jobs(self, worker: int) -> tuple[Job, ...]:
        return self.jobs[self.worker_begin[worker] : self.worker_begin[worker + 1]]


def decode_plan(plan: ArrayLike) -> Plan:
    """Decode a plan buffer.

    Args:
        plan: 1-D int32 array or CPU tensor, as tilestream._C.Planner.plan returns it.
    Returns:
        A Plan that owns its data.
    Raises:
        ValueError: not a plan, or a plan cut short.
    """
    words = np.asarray(plan)
    if words.ndim != 1 or words.dtype != np.int32 or words.size < 32 or words[0] != PLAN_MAGIC:
        raise ValueError(f"not a plan (1-D int32 that starts with {PLAN_MAGIC:#x}): {words.dtype} {words.shape}")
    h = dict(zip(_HEADER_FIELDS, words.tolist(), strict=False))
    if words.size < h["total_int32"]:
        raise ValueError(f"the plan has {words.size} int32, but its header says {h['total_int32']}")

    def table(name: str, num: int, columns: int) -> list[list[int]]:
        begin = h[name + "_offset"]
        return words[begin : begin + num * columns].reshape(num, columns).tolist()

    q_rows = words[h["q_rows_offset"] : h["q_rows_offset"] + h["num_q_rows"]].tolist()
    parts = words[h["merge_parts_offset"] : h["merge_parts_offset"] + h["num_merge_parts"]].tolist()
    jobs = tuple(Job(tuple(q_rows[row : row + num]), *rest) for row, num, *rest in table("jobs", h["num_jobs"], 8))
    merges = tuple(
        Merge(token, head, tuple(parts[begin : begin + num]))
        for token, head, begin, num in table("merges", h["num_merges"], 4)
    )
    begins = words[h["worker_begin_offset"] :][: h["num_workers"] + 1].tolist()

    def optional(name: str, num: int) -> tuple[int, ...] | None:
        begin = h[name + "_offset"]
        return tuple(words[begin : begin + num].tolist()) if begin else None

    same_names = {name: h[name] for name in Plan.__dataclass_fields__ if name in h}
    same_names |= {name: bool(h[name]) for name in ("causal", "lists_per_head")}
    return Plan(
        **same_names,
        batch_invariant=h["mode"] == 1,
        jobs=jobs,
        worker_begin=tuple(begins),
        merges=merges,
        merge_of_row=optional("merge_of_row", h["num_partial_rows"]),
        merge_counters=optional("merge_counters", len(merges) * (h["num_qo_heads"] // h["num_kv_heads"])),
    )


def mask(cu_seqlens_q: ArrayLike, kv_lens: ArrayLike, *, num_kv_heads: int, causal: bool, window_left: int) -> NDArray:
    """What every token attends to.

    Args:
        cu_seqlens_q: [batch_size + 1] integers.
        kv_lens: [batch_size] or [batch_size, num_kv_heads] integers, in tokens.
    Returns:
        bool [num_tokens, num_kv_heads, max kv_len].
    """
    cu, lens = np.asarray(cu_seqlens_q), np.asarray(kv_lens)
    lens = lens if lens.ndim == 2 else np.repeat(lens[:, None], num_kv_heads, axis=1)
    out = np.zeros((int(cu[-1]), num_kv_heads, int(lens.max(initial=0))), dtype=bool)
    for request, (begin, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        for head in range(num_kv_heads):
            kv_len = lens[request, head]
            keys = np.arange(kv_len)
            for token in range(begin, end):
                position = kv_len - end + token
                seen = (keys <= position) if causal else np.ones(kv_len, dtype=bool)
                if window_left >= 0:
                    seen &= keys >= position - window_left
                out[token, head, :kv_len] = seen
    return out


def check_coverage(plan: Plan, cu_seqlens_q: ArrayLike, kv_lens: ArrayLike) -> None:
    """Check that each output gets every key of its mask exactly once, in rising order, and is written once.

    Args:
        plan: a decoded plan.
        cu_seqlens_q, kv_lens: the step it was built for.
    Raises:
        ValueError: the first token, kv head and keys that are wrong.
    """
    want = mask(
        cu_seqlens_q, kv_lens, num_kv_heads=plan.num_kv_heads, causal=plan.causal, window_left=plan.window_left
    )
    lists_of_token = np.repeat(np.arange(plan.batch_size), np.diff(np.asarray(cu_seqlens_q)))
    counts = np.zeros(want.shape, dtype=np.int32)
    writes = np.zeros(want.shape[:2], dtype=np.int32)
    part_of: dict[int, tuple[int, int, range]] = {}  # partial row -> token, kv head, keys
    for job in plan.jobs:
        for i, token in enumerate(job.tokens):
            request = int(lists_of_token[token])
            own_list = request * plan.num_kv_heads + job.kv_head if plan.lists_per_head else request
            if not job.is_prefix and job.page_list != own_list:
                raise ValueError(f"token {token} reads page list {job.page_list}, its own is {own_list}")
            keys = job.sees(plan, i)
            if job.is_final:
                counts[token, job.kv_head, keys.start : keys.stop] += 1
                writes[token, job.kv_head] += 1
            elif job.partial_begin + i in part_of:
                raise ValueError(f"partial row {job.partial_begin + i} is written twice")
            else:
                part_of[job.partial_begin + i] = (token, job.kv_head, keys)
    if sorted(part_of) != list(range(plan.num_partial_rows)):
        raise ValueError(f"{len(part_of)} partial rows are written, but the plan has {plan.num_partial_rows}")
    for merge in plan.merges:
        writes[merge.token, merge.kv_head] += 1
        last_key = -1
        for part in merge.parts:
            token, head, keys = part_of[part]
            if (token, head) != (merge.token, merge.kv_head):
                own = f"token {merge.token}, kv head {merge.kv_head}"
                raise ValueError(f"the merge of {own} takes a part of token {token}, kv head {head}")
            if len(keys) == 0 or keys.start <= last_key:
                raise ValueError(f"token {token}, kv head {head}: keys {keys} are merged after key {last_key}")
            last_key = keys.stop - 1
            counts[token, head, keys.start : keys.stop] += 1
    for name, got, expected in (("written", writes, np.ones_like(writes)), ("key covered", counts, want)):
        wrong = np.argwhere(got != expected)
        if len(wrong):
            where = tuple(wrong[0])
            times = f"{got[where]} times instead of {int(expected[where])}"
            raise ValueError(f"{name} {times} at token, kv head, key: {', '.join(str(int(i)) for i in where)}")
