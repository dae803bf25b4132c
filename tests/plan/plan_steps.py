"""Random planner configurations and steps, and what the tests ask of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tilestream import _C
from tilestream.reference.plan import Job, Plan, decode_plan

DEFAULTS: dict[str, Any] = dict(
    num_qo_heads=4, num_kv_heads=2, page_size=16, num_workers=4, tile_rows=16, tile_keys=16, split_tokens=64,
    window_left=-1, causal=True, batch_invariant=False, cost_tile=8, cost_row=1, narrow_rows=0, merge_inside=False,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A planner's configuration and one step for it."""

    config: dict[str, Any]
    q_lens: list[int]
    kv_lens: np.ndarray
    groups: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def cu_seqlens_q(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.q_lens)]).astype(np.int32)

    def plan(self, planner: Any = None) -> Plan:
        planner = planner or _C.Planner(**self.config)
        return decode_plan(planner.plan(self.cu_seqlens_q, self.kv_lens, self.groups))

    def tile_cost(self, job: Job) -> int:
        group_size = self.config["num_qo_heads"] // self.config["num_kv_heads"]
        return self.config["cost_tile"] + self.config["cost_row"] * len(job.tokens) * group_size

    def is_narrow(self, job: Job) -> bool:
        group_size = self.config["num_qo_heads"] // self.config["num_kv_heads"]
        return len(job.tokens) * group_size <= self.config["narrow_rows"]


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    num_kv_heads, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    page_size, tile_keys = draw(st.sampled_from([(16, 16), (16, 48), (32, 16), (32, 32), (64, 32), (64, 64)]))
    config = dict(
        num_kv_heads=num_kv_heads,
        num_qo_heads=num_kv_heads * group_size,
        page_size=page_size,
        tile_keys=tile_keys,
        num_workers=draw(st.sampled_from([1, 2, 3, 7, 40])),
        tile_rows=group_size * draw(st.integers(1, 6)) + draw(st.integers(0, group_size - 1)),
        split_tokens=tile_keys * draw(st.integers(1, 4)),
        causal=draw(st.booleans()),
        window_left=draw(st.one_of(st.just(-1), st.integers(0, 120))),
        batch_invariant=draw(st.booleans()),
        cost_tile=draw(st.sampled_from([0, 1, 50])),
        cost_row=draw(st.sampled_from([1, 7])),
        narrow_rows=draw(st.sampled_from([0, 1, group_size, 2 * group_size, 16])),
        merge_inside=draw(st.booleans()),
    )
    return config | fixed


@st.composite
def groups_of(draw: st.DrawFn, room: list[int], page_size: int) -> list[tuple[int, list[int]]]:
    """Disjoint groups of requests; room: the tokens that each request has before its own."""
    requests = draw(st.permutations(range(len(room))))
    groups = []
    while requests:
        num = draw(st.integers(1, len(requests)))
        members, requests = requests[:num], requests[num:]
        pages = min(room[b] for b in members) // page_size
        if draw(st.booleans()):
            groups.append((page_size * draw(st.integers(0, pages)), list(members)))
    return groups


@st.composite
def steps(draw: st.DrawFn, **fixed: Any) -> Step:
    config = draw(configs(**fixed))
    batch_size = draw(st.integers(0, 6))
    q_lens = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 7, 20]), min_size=batch_size, max_size=batch_size))
    lists_per_head = config["window_left"] == -1 and draw(st.booleans())
    shape = (batch_size, config["num_kv_heads"]) if lists_per_head else (batch_size,)
    num_lists = int(np.prod(shape))
    lens = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 300)), min_size=num_lists, max_size=num_lists))
    kv_lens = np.array(lens, dtype=np.int32).reshape(shape)
    if config["causal"]:
        kv_lens += np.array(q_lens, dtype=np.int32).reshape((batch_size,) + (1,) * (len(shape) - 1))
    groups: list[tuple[int, list[int]]] = []
    if config["causal"] and config["window_left"] == -1 and draw(st.booleans()):
        room = [int(np.min(kv_lens[b])) - q_lens[b] for b in range(batch_size)]
        groups = draw(groups_of(room, config["page_size"]))
    return Step(config, q_lens, kv_lens, groups)


def parts_by_row(plan: Plan) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(token, kv head) -> the key ranges that are reduced on their own, in merging order."""
    keys_of_partial = {}
    parts = {}
    for job in plan.jobs:
        for i, token in enumerate(job.tokens):
            keys = job.sees(plan, i)
            if job.is_final:
                parts[token, job.kv_head] = [(keys.start, keys.stop)]
            else:
                keys_of_partial[job.partial_begin + i] = (keys.start, keys.stop)
    for merge in plan.merges:
        parts[merge.token, merge.kv_head] = [keys_of_partial[part] for part in merge.parts]
    return parts
