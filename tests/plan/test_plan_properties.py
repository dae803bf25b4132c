"""What holds for every plan, whatever the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from tilestream import _C
from tilestream.reference.plan import Plan, check_coverage, decode_plan

from .plan_steps import Step, parts_by_row, steps


@given(steps())
def test_every_key_of_the_mask_is_covered_exactly_once(step: Step) -> None:
    check_coverage(step.plan(), step.cu_seqlens_q, step.kv_lens)


@given(steps())
def test_worker_ranges_partition_the_jobs(step: Step) -> None:
    plan = step.plan()
    narrow = step.config["narrow_rows"] > 0 and not plan.batch_invariant
    assert plan.num_workers == step.config["num_workers"] * (2 if narrow else 1)
    assert plan.num_narrow_workers == (step.config["num_workers"] if narrow else 0)
    assert plan.worker_begin[0] == 0 and plan.worker_begin[-1] == len(plan.jobs)
    assert all(begin <= end for begin, end in pairwise(plan.worker_begin))


@given(steps(batch_invariant=False))
def test_narrow_lists_hold_the_units_of_few_rows_and_wide_lists_all_others(step: Step) -> None:
    plan = step.plan()
    for worker in range(plan.num_workers):
        narrow = worker >= plan.num_workers - plan.num_narrow_workers
        assert all(step.is_narrow(job) == narrow for job in plan.worker_jobs(worker))


@given(steps(narrow_rows=0), st.integers(1, 20))
def test_narrow_lists_change_where_units_are_cut_and_nothing_else(step: Step, narrow_rows: int) -> None:
    """Every kv tile of every unit is in exactly one job, with narrow lists as without."""

    def tiles(plan: Plan) -> list[tuple]:
        return sorted(
            (job.tokens, job.kv_head, job.page_list, job.q_pos_begin, key, min(key + plan.tile_keys, job.kv_end))
            for job in plan.jobs
            for key in range(job.kv_begin, job.kv_end, plan.tile_keys)
        )

    plan, split = step.plan(), replace(step, config=step.config | dict(narrow_rows=narrow_rows)).plan()
    assert tiles(plan) == tiles(split)
    if plan.batch_invariant:
        assert plan == split


@given(steps())
def test_no_worker_gets_more_than_one_tile_above_the_even_share(step: Step) -> None:
    """Of its kind. In batch-invariant mode, whose jobs are never cut: not more than one job."""
    plan = step.plan()
    for workers in plan.kinds:
        jobs = plan.jobs[plan.worker_begin[workers.start] : plan.worker_begin[workers.stop]]
        piece = map(plan.cost if plan.batch_invariant else step.tile_cost, jobs)
        total, most = sum(map(plan.cost, jobs)), max(piece, default=0)
        for worker in workers:
            # (load - share) * number of workers, so as to stay in integers
            load = sum(map(plan.cost, plan.worker_jobs(worker)))
            assert load * len(workers) - total <= most * len(workers)


@given(steps())
def test_jobs_keep_to_the_tile_grid(step: Step) -> None:
    plan, config = step.plan(), step.config
    group_size = config["num_qo_heads"] // config["num_kv_heads"]
    for job in plan.jobs:
        assert job.kv_begin < job.kv_end and 0 < len(job.tokens) * group_size <= config["tile_rows"]
        if plan.batch_invariant or not step.groups:  # a member's tiles may start at the end of its prefix
            assert job.kv_begin % config["tile_keys"] == 0
        if plan.batch_invariant:
            assert job.kv_begin // config["split_tokens"] == (job.kv_end - 1) // config["split_tokens"]


@given(steps(batch_invariant=False))
def test_balanced_mode_cuts_at_most_once_per_worker(step: Step) -> None:
    plan = step.plan()
    units = {(job.tokens, job.kv_head, job.is_prefix) for job in plan.jobs}
    assert len(plan.jobs) <= len(units) + sum(len(workers) - 1 for workers in plan.kinds)


@given(steps(merge_inside=True))
def test_merge_of_row_is_the_inverse_of_the_merges(step: Step) -> None:
    plan = step.plan()
    merge_of_row = [-1] * plan.num_partial_rows
    for index, merge in enumerate(plan.merges):
        for part in merge.parts:
            assert merge_of_row[part] == -1
            merge_of_row[part] = index
    assert plan.merge_of_row == tuple(merge_of_row)


@given(steps(merge_inside=True))
def test_merge_counters_are_zeros_whatever_the_buffer_held(step: Step) -> None:
    planner = _C.Planner(**step.config)
    plan = step.plan(planner)
    group_size = plan.num_qo_heads // plan.num_kv_heads
    assert plan.merge_counters == (0,) * (len(plan.merges) * group_size)
    planner.plan(step.cu_seqlens_q, step.kv_lens, step.groups).fill(7)
    assert step.plan(planner) == plan


@given(steps(), steps())
def test_planning_is_deterministic_and_keeps_nothing_of_earlier_steps(step: Step, other: Step) -> None:
    planner = _C.Planner(**step.config)
    first = planner.plan(step.cu_seqlens_q, step.kv_lens, step.groups).copy()
    other_lens = np.zeros(len(other.q_lens), dtype=np.int32) + 400
    planner.plan(other.cu_seqlens_q, other_lens)
    np.testing.assert_array_equal(planner.plan(step.cu_seqlens_q, step.kv_lens, step.groups), first)
    np.testing.assert_array_equal(_C.Planner(**step.config).plan(step.cu_seqlens_q, step.kv_lens, step.groups), first)


@given(steps(batch_invariant=True))
def test_invariant_parts_do_not_depend_on_the_batch_or_its_groups(step: Step) -> None:
    in_batch = parts_by_row(step.plan())
    for request, q_len in enumerate(step.q_lens):
        alone = parts_by_row(Step(step.config, [q_len], step.kv_lens[request : request + 1]).plan())
        first = int(step.cu_seqlens_q[request])
        assert alone == {(t - first, h): in_batch[t, h] for t, h in in_batch if first <= t < first + q_len}


@given(steps(batch_invariant=True, causal=True), st.data())
def test_invariant_parts_do_not_depend_on_the_chunking(step: Step, data: st.DataObject) -> None:
    """The rows of a prompt, planned whole, against the same rows planned chunk by chunk."""
    assume(step.q_lens and step.q_lens[0] > 1)
    q_len, kv_len = step.q_lens[0], step.kv_lens[:1]
    whole = parts_by_row(Step(step.config, [q_len], kv_len).plan())
    cut = data.draw(st.integers(1, q_len - 1))
    head = parts_by_row(Step(step.config, [cut], kv_len - (q_len - cut)).plan())
    tail = parts_by_row(Step(step.config, [q_len - cut], kv_len).plan())
    assert whole == head | {(token + cut, kv_head): parts for (token, kv_head), parts in tail.items()}


@given(steps())
def test_measured_bounds_hold(step: Step) -> None:
    planner = _C.Planner(**step.config)
    num_int32, num_rows = planner.measure(step.cu_seqlens_q, step.kv_lens, step.groups)
    buffer = planner.plan(step.cu_seqlens_q, step.kv_lens, step.groups)
    assert len(buffer) <= num_int32
    assert decode_plan(buffer).num_partial_rows <= num_rows
